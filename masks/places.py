"""Where an image token is, and how a table of many of them holds it: one int32 for frame, row and column together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TEXT, POOLED, PADDING = -1, -2, -3
"""What a table holds in place of a place for tokens that are no image tokens."""

Coordinates = tuple[Tensor, Tensor, Tensor]
"""Frame, row and column of some tokens, along axes 0, 1 and 2. The frame of an image's tokens is 0."""

Interval = tuple[Tensor, Tensor]
"""First and last place of many stretches of an axis, inclusive, int32."""

Box = tuple[Interval, Interval, Interval]
"""Many cuboids of tokens: their intervals of frames, rows and columns."""

FAR = 1 << 20
"""An empty interval goes from FAR to -FAR."""


@dataclass(frozen=True)
class Packing:
    """How many bits of an int32 the row and the column have; what is left is the frame's, in front.

    >>> IMAGES.unpack(torch.tensor(3 << 16 | 5))
    (tensor(0), tensor(3), tensor(5))

    Attributes:
        row_bits, column_bits: of each.
        has_frames: whether there is more than frame 0.
    """

    row_bits: int
    column_bits: int
    has_frames: bool

    def pack(self, frame: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """The place as one number."""
        packed = row << self.column_bits | column
        return frame << (self.row_bits + self.column_bits) | packed if self.has_frames else packed

    def unpack(self, packed: Tensor) -> Coordinates:
        """What ``pack`` was given; of tokens that are no image tokens, anything."""
        row, column = packed >> self.column_bits, packed & ((1 << self.column_bits) - 1)
        if not self.has_frames:
            return torch.zeros_like(packed), row, column
        return packed >> (self.row_bits + self.column_bits), row & ((1 << self.row_bits) - 1), column


IMAGES, CLIPS = Packing(15, 16, False), Packing(10, 10, True)
"""Of one frame, and of several."""


def gap(query: Interval, key: Interval) -> Tensor:
    """Least distance between places of two intervals, 0 where they overlap; at most 16384, also of empty ones."""
    return torch.maximum(query[0] - key[1], key[0] - query[1]).clamp_(0, _MOST)


def span(query: Interval, key: Interval) -> Tensor:
    """Greatest distance between places of two intervals."""
    return torch.maximum(query[1] - key[0], key[1] - query[0]).clamp_(0, _MOST)


def meets_phase(query: Interval, key: Interval, stride: int) -> Tensor:
    """Whether places of two intervals differ by a multiple of ``stride``; empty intervals have none."""
    least, most = query[0] - key[1], query[1] - key[0]
    multiple = torch.div(most, stride, rounding_mode="floor") * stride
    return (multiple >= least) & (query[0] <= query[1]) & (key[0] <= key[1])


_MOST = 1 << 14
