"""The conditions of the paper's ControlNets, computed from an image: what a controlled image must agree with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageFilter

BLUR = 64
"""The blur's standard deviation is the longer side over this."""

TILE = 8
"""A tile condition has 1 / this of the image's sides."""


def _grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(max(picture.size) / BLUR))


def _tile(picture: Image.Image) -> Image.Image:
    small = [max(1, side // TILE) for side in picture.size]
    return picture.resize((small[0], small[1]), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


CONDITIONS: Mapping[str, Callable[[Image.Image], Image.Image]] = {"grey": _grey, "blur": _blur, "tile": _tile}
"""By name: ``grey``: luminance; ``blur``: Gaussian; ``tile``: scaled down and up again."""


def distance_to_condition(picture: Image.Image, condition: Image.Image, kind: str) -> float:
    """RMSE, of values from 0 to 1, of the image's condition to the one that it was drawn from.

    Args:
        picture: RGB.
        condition: RGB; scaled to the image's size.
        kind: of ``CONDITIONS``.
    """
    own = CONDITIONS[kind](picture.convert("RGB"))
    if condition.size != own.size:
        condition = condition.resize(own.size, Image.Resampling.LANCZOS)
    difference = (np.asarray(own, dtype=np.float64) - np.asarray(condition.convert("RGB"), dtype=np.float64)) / 255
    return float(np.sqrt(np.mean(difference**2)))
