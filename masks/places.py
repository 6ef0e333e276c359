"""Where an image token is, and how tables store that: frame, row and column packed into one int32."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

TEXT, POOLED, PADDING = -1, -2, -3
"""Table entries for tokens that are not image tokens."""

Coordinates = tuple[Tensor, Tensor, Tensor]
"""Frame, row and column of some tokens, axes 0, 1 and 2. An image's tokens are all in frame 0."""

Interval = tuple[Tensor, Tensor]
"""First and last place of many intervals along an axis, inclusive, int32."""

Box = tuple[Interval, Interval, Interval]
"""Many cuboids of tokens: their intervals along frames, rows and columns."""

FAR = 1 << 20
"""An empty interval goes from FAR to -FAR."""


class Packing(ABC):
    """How a place is packed into one int32: the frame first, then the row, then the column.

    >>> IMAGES.unpack(torch.tensor(3 << 16 | 5))
    (tensor(0), tensor(3), tensor(5))

    Shifts are literals. Read from attributes, they would become symbols in the compiled kernel: one more argument, and a bit
    mask computed as a power in float64 for every pair of a partial block.

    Attributes:
        has_frames: whether there are frames other than frame 0.
    """

    has_frames: bool

    @abstractmethod
    def pack(self, frame: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """The place as one number."""

    @abstractmethod
    def unpack(self, packed: Tensor) -> Coordinates:
        """Undo ``pack``; undefined for tokens that are not image tokens."""


class _OfImages(Packing):
    """One frame: 15 bits for the row, 16 for the column."""

    has_frames = False

    def pack(self, frame: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row << 16 | column

    def unpack(self, packed: Tensor) -> Coordinates:
        return torch.zeros_like(packed), packed >> 16, packed & 0xFFFF


class _OfClips(Packing):
    """Several frames: 10 bits for each axis."""

    has_frames = True

    def pack(self, frame: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return frame << 20 | row << 10 | column

    def unpack(self, packed: Tensor) -> Coordinates:
        return packed >> 20, packed >> 10 & 0x3FF, packed & 0x3FF


IMAGES, CLIPS = _OfImages(), _OfClips()


def gap(query: Interval, key: Interval) -> Tensor:
    """Least distance between places of two intervals, 0 if they overlap; at most 16384, even for empty ones."""
    return torch.maximum(query[0] - key[1], key[0] - query[1]).clamp_(0, _MOST)


def span(query: Interval, key: Interval) -> Tensor:
    """Greatest distance between places of two intervals."""
    return torch.maximum(query[1] - key[0], key[1] - query[0]).clamp_(0, _MOST)


def meets_phase(query: Interval, key: Interval, stride: int) -> Tensor:
    """Whether any places of two intervals differ by a multiple of ``stride``; never for empty intervals."""
    least, most = query[0] - key[1], query[1] - key[0]
    multiple = torch.div(most, stride, rounding_mode="floor") * stride
    return (multiple >= least) & (query[0] <= query[1]) & (key[0] <= key[1])


_MOST = 1 << 14
