"""Images larger than a model was trained for, from a windowed model (method, section 7).

Two published routes, on FLUX.1 and SD3.5, from a prompt or from a given image:

- SDEdit (arXiv 2108.01073, section 3), as a cascade: enlarge the image, noise it, denoise it at the larger size.
- I-Max (arXiv 2410.07536, sections 3 and 4): denoise from noise at the larger size, while the low frequencies follow the
  straight flow towards the enlarged image.

>>> from flexclear.highres import upscale_cascade
>>> upscale_cascade(pipe, "a small blue plane", sizes=[1024, 2048, 4096]).image.save("plane.png")  # doctest: +SKIP
"""

from __future__ import annotations

from flexclear.common.choices import METHODS, parse_sizes
from flexclear.highres.cascade import Cascade, upscale_cascade
from flexclear.highres.imax import low_band, projected_velocity
from flexclear.highres.seams import seam_ratio
from flexclear.highres.stages import Stage
from flexclear.highres.tiling import tiled

__all__ = [
    "METHODS",
    "Cascade",
    "Stage",
    "low_band",
    "parse_sizes",
    "projected_velocity",
    "seam_ratio",
    "tiled",
    "upscale_cascade",
]
