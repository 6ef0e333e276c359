"""Windows: CLEAR's disc, and those it is compared with (paper section 4, Table 1).

Each class states its inequality for a query (y_q, x_q) and a key (y_k, x_k) on a grid of h x w image tokens. Neighborhoods and
squares are in ``neighborhoods.py``, windows over the frames of a video in ``tubes.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexclear.masks.checks import check_int
from flexclear.masks.coordinates import Number, Reads
from flexclear.masks.layout import MAX_SIDE, Layout
from flexclear.masks.places import Box, Coordinates, Interval, gap, meets_phase, span
from flexclear.masks.windows import Rule, Window

MAX_FLOAT_RADIUS = 1 << 12
"""Largest radius whose square compares exactly with any sum of squares in float32."""


def _at_offset(side_a: int, side_b: int, offsets: Tensor) -> Tensor:
    """For each offset, the number of pairs of places, one on each of two axes, that lie this far apart."""
    return (torch.minimum(torch.tensor(side_a), side_b - offsets) - (-offsets).clamp(min=0)).clamp(min=0)


def offset_pairs(layout: Layout, radius: int, inside: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Number of pairs that a rule on offsets below ``radius`` allows, over every pair of grids. Within one grid, an offset
    (dy, dx) has (h - |dy|) * (w - |dx|) pairs."""
    total = 0
    for (h_q, w_q), (h_k, w_k) in itertools.product(layout.grids, repeat=2):
        dy = torch.arange(1 - min(h_q, radius), min(h_k, radius))[:, None]
        dx = torch.arange(1 - min(w_q, radius), min(w_k, radius))[None, :]
        total += int((inside(dy.abs(), dx.abs()) * _at_offset(h_q, h_k, dy) * _at_offset(w_q, w_k, dx)).sum())
    return total


@dataclass(frozen=True)
class Disc(Window):
    r"""CLEAR's circular window, clipped at the image border, never shifted (paper section 3.2).

    .. math:: (y_q - y_k)^2 + (x_q - x_k)^2 < r^2

    Args:
        radius: window radius r in tokens, 1 or more; the inequality is strict, so r = 1 is the token itself.

    Raises:
        TypeError: radius is not an int.
        ValueError: radius < 1.
    """

    radius: int

    def __post_init__(self) -> None:
        check_int("window radius r", self.radius, 1, None, "in tokens")

    @property
    def name(self) -> str:
        return f"disc_r{self.radius}"

    def _square(self) -> int:
        # Beyond the largest diagonal every radius is the same window; the clamp keeps the square inside 32 bits.
        return min(self.radius, 2 * MAX_SIDE) ** 2

    @property
    def reads(self) -> Reads:
        # In float32 a sum of squares below 2^24 is exact, and a larger one is not rounded below it.
        return "offsets" if self.radius <= MAX_FLOAT_RADIUS else "integers"

    @property
    def reach(self) -> int:
        return self.radius

    def rule(self, layout: Layout, number: Number) -> Rule:
        square = number(self._square())

        def inside(query: Coordinates, key: Coordinates) -> Tensor:
            dy, dx = query[1] - key[1], query[2] - key[2]
            return dy * dy + dx * dx < square

        return inside

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        dy, dx = gap(query[1], key[1]), gap(query[2], key[2])
        return dy * dy + dx * dx < self._square()

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        dy, dx = span(query[1], key[1]), span(query[2], key[2])
        return dy * dy + dx * dx < self._square()

    def image_pairs(self, layout: Layout) -> int:
        return offset_pairs(layout, self.radius, lambda dy, dx: dy * dy + dx * dx < self._square())


@dataclass(frozen=True)
class Swin(Window):
    r"""Swin's partition: a query sees its own w x w window. In Swin, windows are shifted by s in every other layer.

    .. math:: \lfloor (y_q - s) / w \rfloor = \lfloor (y_k - s) / w \rfloor

    and likewise in x. With s > 0 the first window of an axis has s rows, as with Swin's cyclic shift and its mask.

    Args:
        window: side w in tokens, 1 or more.
        shift: s in tokens, 0 to w - 1.
    """

    window: int
    shift: int = 0

    def __post_init__(self) -> None:
        check_int("swin window", self.window, 1, MAX_SIDE, "in tokens")
        check_int("swin shift", self.shift, 0, self.window - 1, "in tokens")

    @property
    def name(self) -> str:
        return f"swin_w{self.window}_s{self.shift}"

    def _cell(self, place: Tensor) -> Tensor:
        return torch.div(place + (self.window - self.shift), self.window, rounding_mode="floor")

    def _cells(self, query: Box, key: Box) -> list[Interval]:
        """Row cells of the query and the key, then their column cells."""
        return [(self._cell(first), self._cell(last)) for axis in (1, 2) for first, last in (query[axis], key[axis])]

    @property
    def reach(self) -> int:
        return self.window

    def rule(self, layout: Layout, number: Number) -> Rule:
        side, lead = number(self.window), number(self.window - self.shift)

        def inside(query: Coordinates, key: Coordinates) -> Tensor:
            (_, y_q, x_q), (_, y_k, x_k) = query, key
            return ((y_q + lead) // side == (y_k + lead) // side) & ((x_q + lead) // side == (x_k + lead) // side)

        return inside

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        (qt, qb), (kt, kb), (ql, qr), (kl, kr) = self._cells(query, key)
        return (qt <= kb) & (kt <= qb) & (ql <= kr) & (kl <= qr)

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        (qt, qb), (kt, kb), (ql, qr), (kl, kr) = self._cells(query, key)
        return (qt == qb) & (kt == kb) & (qt == kt) & (ql == qr) & (kl == kr) & (ql == kl)

    def image_pairs(self, layout: Layout) -> int | None:
        if layout.references:
            return None
        total = 1
        for side in (layout.height, layout.width):
            total *= int(self._cell(torch.arange(side)).bincount().square().sum())
        return total


@dataclass(frozen=True)
class Strided(Window):
    r"""Strided attention: a query sees the keys of its own phase on a grid of stride d.

    .. math:: y_q \equiv y_k, \quad x_q \equiv x_k \pmod d

    Args:
        stride: d in tokens, 1 or more.
    """

    stride: int

    def __post_init__(self) -> None:
        check_int("stride", self.stride, 1, MAX_SIDE, "in tokens")

    @property
    def name(self) -> str:
        return f"strided_d{self.stride}"

    def rule(self, layout: Layout, number: Number) -> Rule:
        stride = number(self.stride)

        def inside(query: Coordinates, key: Coordinates) -> Tensor:
            (_, y_q, x_q), (_, y_k, x_k) = query, key
            return (y_q % stride == y_k % stride) & (x_q % stride == x_k % stride)

        return inside

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        rows, columns = (meets_phase(query[axis], key[axis], self.stride) for axis in (1, 2))
        return rows & columns

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        if self.stride == 1:
            return torch.ones_like(query[1][0] + key[1][0], dtype=torch.bool)
        rows, columns = ((edges[0] == edges[1]) for edges in (query[1], query[2]))
        key_rows, key_columns = ((edges[0] == edges[1]) for edges in (key[1], key[2]))
        return rows & columns & key_rows & key_columns & self.touches(layout, query, key)

    def image_pairs(self, layout: Layout) -> int | None:
        if layout.references:
            return None
        total = 1
        for side in (layout.height, layout.width):
            total *= int((torch.arange(side) % self.stride).bincount().square().sum())
        return total


@dataclass(frozen=True)
class Full(Window):
    """Every image query sees every image key: dense attention, for comparison and composition."""

    @property
    def name(self) -> str:
        return "full"

    @property
    def reads(self) -> Reads:
        return "offsets"

    @property
    def knows_frames(self) -> bool:
        return True

    def rule(self, layout: Layout, number: Number) -> Rule:
        return lambda query, key: query[1] + key[1] >= query[1] + key[1]

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        return (query[1][0] <= query[1][1]) & (key[1][0] <= key[1][1])

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        return self.touches(layout, query, key)

    def image_pairs(self, layout: Layout) -> int:
        return layout.image_len**2
