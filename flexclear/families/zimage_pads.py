"""How many pads Z-Image adds, and how a rank's part of an image gets the pads of the whole image."""

from __future__ import annotations

import functools

from flexclear.runtime.call_plan import CallPlan

MULTIPLE = 32
"""Images and captions are padded to a multiple of this many tokens."""


def padding(length: int) -> int:
    """Number of pads added to an image or a caption of ``length`` tokens."""
    return -length % MULTIPLE


def pads_of(plan: CallPlan) -> int:
    """Number of pads of the whole image, on every rank."""
    return padding(plan.base.layout.image_len)


@functools.lru_cache(maxsize=64)
def room_for(own: int, pads: int, positions: tuple[int, ...]) -> tuple[int, int]:
    """The smallest grid of ``own`` tokens or more that, padded, has room for ``pads``, and has at least one pad if these exist.

    Args:
        own: image tokens of a rank.
        pads: number of pads of the whole image.
        positions: number of the model's positions for captions, rows and columns. The model looks up this grid's positions, but
            does not use them.
    """
    _, rows, columns = positions
    least = max(own, 1)
    return next(
        (height, width)
        for height in range(-(-least // columns), rows + 1)
        for width in range(-(-least // height), columns + 1)
        if height * width + padding(height * width) >= own + pads and (not pads or padding(height * width))
    )
