"""How many tokens Z-Image pads with, and how a rank's part of an image gets the pads of the whole one."""

from __future__ import annotations

import functools

from flexclear.runtime.call_plan import CallPlan

MULTIPLE = 32
"""Images and captions are padded to a multiple of as many tokens."""


def padding(length: int) -> int:
    """Number of tokens that an image or a caption of ``length`` is padded with."""
    return -length % MULTIPLE


def pads_of(plan: CallPlan) -> int:
    """Number of the image's pads, those of the whole image on every rank."""
    return padding(plan.base.layout.image_len)


@functools.lru_cache(maxsize=64)
def room_for(own: int, pads: int, positions: tuple[int, ...]) -> tuple[int, int]:
    """The smallest grid of ``own`` tokens or more whose padding makes room for ``pads``, with one pad at least if so.

    Args:
        own: image tokens of a rank.
        pads: of the whole image.
        positions: how many the model has for captions, rows and columns. Those of this grid are not used, but looked up.
    """
    _, rows, columns = positions
    least = max(own, 1)
    return next(
        (height, width)
        for height in range(-(-least // columns), rows + 1)
        for width in range(-(-least // height), columns + 1)
        if height * width + padding(height * width) >= own + pads and (not pads or padding(height * width))
    )
