"""Load the embedded model's ControlNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flexclear.common.shipped import controlnet_directory
from flexclear.embedded.fingerprint import teacher_fingerprint

if TYPE_CHECKING:
    import torch
    from diffusers import FluxControlNetModel

MODES = {"grey": 0, "blur": 1, "tile": 2}
"""The ``control_mode`` of each condition, by its name in ``flexclear.evaluation.conditions``."""
FACTS_NAME = "training.json"


def controlnet(
    torch_dtype: torch.dtype | None = None, device: torch.device | str | None = None, folder: Path | None = None
) -> FluxControlNetModel:
    """Return the embedded model's ControlNet: one network for gray, blurred and tiled images, selected by ``MODES``.

    >>> from diffusers import FluxControlNetPipeline                             # doctest: +SKIP
    >>> pipe = embedded.pipeline()                                               # doctest: +SKIP
    >>> guided = FluxControlNetPipeline(**pipe.components, controlnet=embedded.controlnet())    # doctest: +SKIP
    >>> guided("a red apple on a blue background", control_image=grey, control_mode=MODES["grey"],
    ...        height=128, width=128).images[0]                                  # doctest: +SKIP

    Args:
        torch_dtype: the weights' data type; float32 when not given.
        device: where to put it; left on the CPU when not given.
        folder: a folder other than the package's.

    Raises:
        FileNotFoundError: the folder holds no ControlNet.
        ValueError: it was trained with weights other than the embedded model's.
    """
    import torch
    from diffusers import FluxControlNetModel

    from flexclear.common.foreign import from_pretrained

    folder = controlnet_directory() if folder is None else folder
    facts = folder / FACTS_NAME
    if not facts.is_file() or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no ControlNet in {folder}: reinstall the package, or train it with "
            "python -m flexclear.embedded.train controlnet"
        )
    teacher, ours = json.loads(facts.read_text(encoding="utf-8"))["teacher"], teacher_fingerprint()
    if teacher != ours:
        raise ValueError(
            f"the ControlNet in {folder} was trained with another model ({teacher}, the model here is {ours}). "
            "Train it again with python -m flexclear.embedded.train controlnet"
        )
    dtype = torch.float32 if torch_dtype is None else torch_dtype
    loaded: FluxControlNetModel = from_pretrained(FluxControlNetModel, folder, dtype, local_files_only=True).eval()
    return loaded if device is None else loaded.to(device)
