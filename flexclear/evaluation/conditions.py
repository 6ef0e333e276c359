"""The conditions of the paper's ControlNets, computed from an image, which a controlled image must match."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageFilter

from flexclear.images.fitting import on_white

BLUR = 64
"""The blur's standard deviation is the longer side divided by this."""

TILE = 8
"""A tile condition's sides are the image's divided by this."""


def _grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(max(picture.size) / BLUR))


def _tile(picture: Image.Image) -> Image.Image:
    small = [max(1, side // TILE) for side in picture.size]
    return picture.resize((small[0], small[1]), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


CONDITIONS: Mapping[str, Callable[[Image.Image], Image.Image]] = {"grey": _grey, "blur": _blur, "tile": _tile}
"""Conditions by name. ``grey``: luminance; ``blur``: Gaussian; ``tile``: scaled down and up again."""


def distance_to_condition(picture: Image.Image, condition: Image.Image, kind: str) -> float:
    """RMSE between the image's own condition and the one that it was drawn from, for values from 0 to 1.

    Args:
        picture: the image; what is transparent lies on white, as where images are drawn from one.
        condition: scaled to the image's size.
        kind: a key of ``CONDITIONS``.
    """
    own, condition = CONDITIONS[kind](on_white(picture)), on_white(condition)
    if condition.size != own.size:
        condition = condition.resize(own.size, Image.Resampling.LANCZOS)
    difference = (np.asarray(own, dtype=np.float64) - np.asarray(condition, dtype=np.float64)) / 255
    return float(np.sqrt(np.mean(difference**2)))
