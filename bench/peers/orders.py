"""Token orders and mask functions of what people use besides, written from their published descriptions.

- The paper's released code: image tokens row by row, rows and columns of a position by division, the disc in a ``mask_mod``.
- attention-gym's natten masks: a square window that is shifted inwards at the border, its centre clamped; image tokens along the
  Morton (Z) curve, rows and columns taken out of a position bit by bit. Here text comes before the image in both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexclear.masks.windows import MaskMod

Coordinates = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Row and column of a place in the image order."""


def by_division(width: int) -> Coordinates:
    """Row by row."""
    return lambda place: (place // width, place % width)


def by_bits(place: Tensor) -> tuple[Tensor, Tensor]:
    """Along the Morton curve: columns are in the even bits, rows in the odd ones. For sides up to 65,536."""
    return _every_other_bit(place >> 1), _every_other_bit(place)


def _every_other_bit(place: Tensor) -> Tensor:
    place = place & 0x55555555
    place = (place | (place >> 1)) & 0x33333333
    place = (place | (place >> 2)) & 0x0F0F0F0F
    place = (place | (place >> 4)) & 0x00FF00FF
    return (place | (place >> 8)) & 0x0000FFFF


def morton_order(side: int) -> Tensor:
    """Raster index at each place of the Morton order of a square whose side is a power of two: int64 ``[side * side]``.

    Raises:
        ValueError: it is none.
    """
    if side & (side - 1):
        raise ValueError(f"the Morton order is for squares whose side is a power of two, got {side}")
    row, column = by_bits(torch.arange(side * side))
    return row * side + column


def disc_mod(coordinates: Coordinates, text_len: int, radius: int) -> MaskMod:
    """CLEAR's window: text sees and is seen by everything, image tokens see those closer than ``radius``."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        q_y, q_x = coordinates(q - text_len)
        kv_y, kv_x = coordinates(kv - text_len)
        dy, dx = q_y - kv_y, q_x - kv_x
        return (q < text_len) | (kv < text_len) | (dy * dy + dx * dx < radius * radius)

    return mask_mod


def natten_mod(coordinates: Coordinates, text_len: int, height: int, width: int, kernel: int) -> MaskMod:
    """A square of ``kernel`` x ``kernel`` tokens around the query, shifted inwards at the border; text as in ``disc_mod``."""
    half = kernel // 2

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        q_y, q_x = coordinates(q - text_len)
        kv_y, kv_x = coordinates(kv - text_len)
        centre_y, centre_x = q_y.clamp(half, height - 1 - half), q_x.clamp(half, width - 1 - half)
        inside = ((centre_y - kv_y).abs() <= half) & ((centre_x - kv_x).abs() <= half)
        return (q < text_len) | (kv < text_len) | inside

    return mask_mod
