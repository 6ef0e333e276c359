"""The windows: CLEAR's disc, and those that it is compared with (paper section 4, Table 1).

Each class states its inequality for a query (y_q, x_q) and a key (y_k, x_k) on a grid of h x w image tokens.
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
from flexclear.masks.windows import Box, Rule, Window

MAX_FLOAT_RADIUS = 1 << 12
"""Largest radius whose square float32 compares exactly with any sum of squares."""


def _gap(low_a: Tensor, high_a: Tensor, low_b: Tensor, high_b: Tensor) -> Tensor:
    """Least distance along one axis between two intervals, 0 where they overlap."""
    return torch.maximum(low_a - high_b, low_b - high_a).clamp_(0, MAX_SIDE)


def _span(low_a: Tensor, high_a: Tensor, low_b: Tensor, high_b: Tensor) -> Tensor:
    """Greatest distance along one axis between two intervals."""
    return torch.maximum(high_a - low_b, high_b - low_a).clamp_(0, MAX_SIDE)


def _at_offset(side_a: int, side_b: int, offsets: Tensor) -> Tensor:
    """How many pairs of a place on one axis and a place on another lie each offset apart."""
    return (torch.minimum(torch.tensor(side_a), side_b - offsets) - (-offsets).clamp(min=0)).clamp(min=0)


def _offset_pairs(layout: Layout, radius: int, inside: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Pairs of a rule on offsets below ``radius``, over every pair of grids: an offset (dy, dx) inside one grid has
    (h - |dy|) * (w - |dx|) pairs."""
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

        def inside(y_q: Tensor, x_q: Tensor, y_k: Tensor, x_k: Tensor) -> Tensor:
            dy, dx = y_q - y_k, x_q - x_k
            return dy * dy + dx * dx < square

        return inside

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        dy, dx = _gap(*query[:2], *key[:2]), _gap(*query[2:], *key[2:])
        return dy * dy + dx * dx < self._square()

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        dy, dx = _span(*query[:2], *key[:2]), _span(*query[2:], *key[2:])
        return dy * dy + dx * dx < self._square()

    def image_pairs(self, layout: Layout) -> int:
        return _offset_pairs(layout, self.radius, lambda dy, dx: dy * dy + dx * dx < self._square())


@dataclass(frozen=True)
class Square(Window):
    r"""A square window, clipped at the image border.

    .. math:: \max(|y_q - y_k|, |x_q - x_k|) < r

    Args:
        radius: half side r in tokens, 1 or more; strict like the disc's, so the side is 2 r - 1.
    """

    radius: int

    def __post_init__(self) -> None:
        check_int("window radius r", self.radius, 1, None, "in tokens")

    @property
    def name(self) -> str:
        return f"square_r{self.radius}"

    @property
    def reads(self) -> Reads:
        return "offsets"

    @property
    def reach(self) -> int:
        return self.radius

    def rule(self, layout: Layout, number: Number) -> Rule:
        radius = number(min(self.radius, 2 * MAX_SIDE))

        def inside(y_q: Tensor, x_q: Tensor, y_k: Tensor, x_k: Tensor) -> Tensor:
            return ((y_q - y_k).abs() < radius) & ((x_q - x_k).abs() < radius)

        return inside

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        return (_gap(*query[:2], *key[:2]) < self.radius) & (_gap(*query[2:], *key[2:]) < self.radius)

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        return (_span(*query[:2], *key[:2]) < self.radius) & (_span(*query[2:], *key[2:]) < self.radius)

    def image_pairs(self, layout: Layout) -> int:
        return _offset_pairs(layout, self.radius, lambda dy, dx: (dy < self.radius) & (dx < self.radius))


@dataclass(frozen=True)
class Neighborhood(Window):
    r"""Neighborhood attention (NATTEN's meaning): a k x k window shifted inwards at the border, so that every query has
    equally many keys.

    .. math:: s(y_q) \le y_k < s(y_q) + k, \quad s(y) = \min(\max(y - \lfloor k / 2 \rfloor, 0), h - k)

    and likewise in x with w.

    Args:
        kernel: side k in tokens, 1 or more; a grid smaller than the kernel on either side is an error.
    """

    kernel: int

    def __post_init__(self) -> None:
        check_int("neighborhood kernel", self.kernel, 1, MAX_SIDE, "in tokens")

    @property
    def name(self) -> str:
        return f"neighborhood_k{self.kernel}"

    def _check(self, layout: Layout) -> None:
        if layout.references:
            raise ValueError(
                f"a neighborhood window is shifted inwards at the border of one grid, and this layout has "
                f"{len(layout.grids)}: {layout.grids}. Use Disc or Square"
            )
        if self.kernel > min(layout.height, layout.width):
            raise ValueError(
                f"a neighborhood of {self.kernel} x {self.kernel} tokens does not fit into a grid of {layout.height} x "
                f"{layout.width}; every query would not have equally many keys. Use a smaller kernel, or Square"
            )

    def _start(self, place: Tensor, side: int) -> Tensor:
        return (place - self.kernel // 2).clamp(0, side - self.kernel)

    @property
    def reads(self) -> Reads:
        return "floats"

    @property
    def reach(self) -> int:
        return self.kernel

    def rule(self, layout: Layout, number: Number) -> Rule:
        self._check(layout)
        kernel, half, zero = number(self.kernel), number(self.kernel // 2), number(0)
        last_y, last_x = number(layout.height - self.kernel), number(layout.width - self.kernel)

        def inside(y_q: Tensor, x_q: Tensor, y_k: Tensor, x_k: Tensor) -> Tensor:
            from_y = y_k - torch.minimum(torch.maximum(y_q - half, zero), last_y)
            from_x = x_k - torch.minimum(torch.maximum(x_q - half, zero), last_x)
            return (from_y >= 0) & (from_y < kernel) & (from_x >= 0) & (from_x < kernel)

        return inside

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        self._check(layout)

        def meets(axis: int, side: int) -> Tensor:
            first, last = self._start(query[axis], side), self._start(query[axis + 1], side) + self.kernel - 1
            return (key[axis] <= last) & (key[axis + 1] >= first) & (query[axis] <= query[axis + 1])

        return meets(0, layout.height) & meets(2, layout.width)

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        def holds(axis: int, side: int) -> Tensor:
            first, last = self._start(query[axis + 1], side), self._start(query[axis], side) + self.kernel - 1
            return (key[axis] >= first) & (key[axis + 1] <= last)

        return holds(0, layout.height) & holds(2, layout.width)

    def image_pairs(self, layout: Layout) -> int:
        self._check(layout)
        return layout.image_len * self.kernel**2


@dataclass(frozen=True)
class Swin(Window):
    r"""Swin's partition: a query sees its own w x w window; windows are shifted by s in every other layer.

    .. math:: \lfloor (y_q - s) / w \rfloor = \lfloor (y_k - s) / w \rfloor

    and likewise in x. With s > 0 the first window of an axis has s rows: what Swin's cyclic shift and its mask do.

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

    @property
    def reach(self) -> int:
        return self.window

    def rule(self, layout: Layout, number: Number) -> Rule:
        side, lead = number(self.window), number(self.window - self.shift)

        def inside(y_q: Tensor, x_q: Tensor, y_k: Tensor, x_k: Tensor) -> Tensor:
            return ((y_q + lead) // side == (y_k + lead) // side) & ((x_q + lead) // side == (x_k + lead) // side)

        return inside

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        (qt, qb, ql, qr), (kt, kb, kl, kr) = ([self._cell(edge) for edge in box] for box in (query, key))
        return (qt <= kb) & (kt <= qb) & (ql <= kr) & (kl <= qr)

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        (qt, qb, ql, qr), (kt, kb, kl, kr) = ([self._cell(edge) for edge in box] for box in (query, key))
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

        def inside(y_q: Tensor, x_q: Tensor, y_k: Tensor, x_k: Tensor) -> Tensor:
            return (y_q % stride == y_k % stride) & (x_q % stride == x_k % stride)

        return inside

    def _meets(self, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
        """Whether the differences of two intervals hold a multiple of the stride; empty intervals never do."""
        least, most = query[0] - key[1], query[1] - key[0]
        multiple = torch.div(most, self.stride, rounding_mode="floor") * self.stride
        return (multiple >= least) & (query[0] <= query[1]) & (key[0] <= key[1])

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        return self._meets((query[0], query[1]), (key[0], key[1])) & self._meets((query[2], query[3]), (key[2], key[3]))

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        if self.stride == 1:
            return torch.ones_like(query[0] + key[0], dtype=torch.bool)
        points = (query[0] == query[1]) & (query[2] == query[3]) & (key[0] == key[1]) & (key[2] == key[3])
        return points & self.touches(layout, query, key)

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

    def rule(self, layout: Layout, number: Number) -> Rule:
        return lambda y_q, x_q, y_k, x_k: y_q + y_k >= y_q + y_k

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        return (query[0] <= query[1]) & (key[0] <= key[1])

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        return self.touches(layout, query, key)

    def image_pairs(self, layout: Layout) -> int:
        return layout.image_len**2
