"""Neighborhoods and squares: windows that are a product of one rule per axis, in two or three dimensions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexclear.masks.checks import check_int
from flexclear.masks.coordinates import Number, Reads
from flexclear.masks.layout import MAX_SIDE, Layout
from flexclear.masks.places import Box, Coordinates, Interval, meets_phase
from flexclear.masks.shapes import offset_pairs
from flexclear.masks.windows import Rule, Window

PerAxis = int | tuple[int, ...]
"""A number for every axis, or a tuple: (rows, columns), or (frames, rows, columns)."""

AXES = ("frames", "rows", "columns")

AxisRule = Callable[[Tensor, Tensor], Tensor]
"""Maps the places of queries and keys along one axis to bool."""


def check_per_axis(name: str, given: Any) -> PerAxis:
    """Return ``given`` if it is one valid number for every axis, or a valid tuple.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(given, int):
        return check_int(name, given, 1, MAX_SIDE, "in tokens")
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        raise TypeError(f"{name} must be an int, (rows, columns) or (frames, rows, columns), got {given!r}")
    for axis, one in zip(AXES[-len(given) :], given, strict=True):
        check_int(f"{name} along {axis}", one, 1, MAX_SIDE, "in tokens")
    return given


def per_axis(name: str, given: PerAxis, layout: Layout) -> tuple[int | None, int, int]:
    """``given`` along the frames, rows and columns of ``layout``; None for an image's frames if it does not cover them.

    Raises:
        ValueError: it does not cover frames, and there are several.
    """
    if isinstance(given, int):
        return (None if layout.frames == 1 else given), given, given
    if len(given) == 2 and layout.frames > 1:
        raise ValueError(f"{name}={given} covers rows and columns only, and this layout has {layout.frames} frames")
    return (None if len(given) == 2 else given[0]), given[-2], given[-1]


def label(given: PerAxis) -> str:
    """A label such as 7 or 3x7x7."""
    return str(given) if isinstance(given, int) else "x".join(map(str, given))


@dataclass(frozen=True)
class Axis:
    r"""One axis of a window with NATTEN's semantics (arXiv 2204.07143, 2209.15001, 2504.16922).

    With dilation d, a query sees only keys of its own phase (position modulo d), and is counted among those: place
    :math:`\lfloor q / d \rfloor` of :math:`n`. With stride s, runs of s queries share the window of their middle one,
    :math:`l = \min(\lfloor q / s \rfloor s + \lfloor s / 2 \rfloor, n - 1)`. It begins at l - before; a window that is
    ``shifted`` inwards begins no further out than the axis allows.

    Attributes:
        side: n of the whole axis, in tokens.
        width: keys of one window.
        before: how many of them come before the query.
        stride, dilation: s and d.
        shifted: whether a window at the border is shifted inwards; otherwise it is clipped.
    """

    side: int
    width: int
    before: int
    stride: int = 1
    dilation: int = 1
    shifted: bool = True

    def _start(self, query: Tensor, side: int | Tensor) -> Tensor:
        """First key of each query's window. Queries are counted within their own phase, which has ``side`` places."""
        if self.stride > 1:
            query = torch.minimum(query // self.stride * self.stride + self.stride // 2, torch.as_tensor(side - 1))
        start = query - self.before
        if not self.shifted:
            return start
        return torch.minimum(start.clamp(min=0), torch.as_tensor(side - self.width))

    def rule(self, number: Number) -> AxisRule:
        """The rule on coordinates; its numbers are tensors."""
        width, before, zero, one = (number(n) for n in (self.width, self.before, 0, 1))
        whole, phases, phases_less = number(self.side), number(self.dilation), number(self.dilation - 1)
        stride, middle = number(self.stride), number(self.stride // 2)
        plain, steps = self.dilation == 1, self.stride > 1
        if plain and not steps and not self.shifted:
            radius = number(self.before + 1)
            return lambda query, key: (query - key).abs() < radius
        shifted = self.shifted

        def inside(query: Tensor, key: Tensor) -> Tensor:
            side, allowed = whole, None
            if not plain:
                own, others = query // phases, key // phases
                phase = query - own * phases
                allowed = phase == key - others * phases
                side = (whole - phase + phases_less) // phases
                query, key = own, others
            if steps:
                query = torch.minimum(query // stride * stride + middle, side - one)
            start = query - before
            if shifted:
                start = torch.minimum(torch.maximum(start, zero), side - width)
            offset = key - start
            found = (offset >= zero) & (offset < width)
            return found if allowed is None else found & allowed

        return inside

    def touches(self, query: Interval, key: Interval) -> Tensor:
        """Whether any pair of the intervals may be allowed; exact without dilation."""
        d = self.dilation
        least, most = self.side // d, -(-self.side // d)
        first = self._start(query[0] // d, least) * d
        last = (self._start(query[1] // d, most) + self.width - 1) * d + d - 1
        found = (key[1] >= first) & (key[0] <= last)
        return found & meets_phase(query, key, d)

    def covers(self, query: Interval, key: Interval) -> Tensor:
        """Whether every pair is allowed."""
        if self.dilation == 1:
            first, last = self._start(query[1], self.side), self._start(query[0], self.side) + self.width - 1
            return (key[0] >= first) & (key[1] <= last)
        d, place, other = self.dilation, query[0], key[0]
        side = (self.side - place % d + d - 1) // d
        start = self._start(place // d, side)
        inside = (place % d == other % d) & (other // d >= start) & (other // d < start + self.width)
        return inside & (query[0] == query[1]) & (key[0] == key[1])

    def pairs(self) -> int:
        """Number of allowed pairs of places along the axis."""
        place, d = torch.arange(self.side), self.dilation
        side = (self.side - place % d + d - 1) // d
        start = self._start(place // d, side)
        return int((torch.minimum(start + self.width, side) - start.clamp(min=0)).clamp(min=0).sum())


class _ByAxis(Window):
    """A window in which a key is seen if the rule of every axis allows it."""

    stride: PerAxis
    dilation: PerAxis

    @abstractmethod
    def _size(self) -> tuple[str, PerAxis]:
        """The name of the window's size, and its value."""

    @abstractmethod
    def _axis(self, side: int, size: int, stride: int, dilation: int) -> Axis:
        """The rule of one axis."""

    def axes(self, layout: Layout) -> tuple[Axis | None, Axis, Axis]:
        """The rules of frames, rows and columns; None for frames if the layout is an image and the window does not cover them.

        Raises:
            ValueError: there are several frames, and the window does not cover frames.
        """
        sizes = per_axis(*self._size(), layout)
        strides, dilations = per_axis("stride", self.stride, layout), per_axis("dilation", self.dilation, layout)
        frames, rows, columns = (
            None if size is None else self._axis(side, size, stride or 1, dilation or 1)
            for side, size, stride, dilation in zip(layout.shape, sizes, strides, dilations, strict=True)
        )
        assert rows is not None
        assert columns is not None
        return frames, rows, columns

    @property
    def knows_frames(self) -> bool:
        return True

    def rule(self, layout: Layout, number: Number) -> Rule:
        rules = [(number_of, axis.rule(number)) for number_of, axis in enumerate(self.axes(layout)) if axis is not None]
        (first, along), *others = rules

        def inside(query: Coordinates, key: Coordinates) -> Tensor:
            allowed = along(query[first], key[first])
            for axis, other in others:
                allowed = allowed & other(query[axis], key[axis])
            return allowed

        return inside

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        frames, rows, columns = self.axes(layout)
        found = rows.touches(query[1], key[1]) & columns.touches(query[2], key[2])
        return found if frames is None else found & frames.touches(query[0], key[0])

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        frames, rows, columns = self.axes(layout)
        found = rows.covers(query[1], key[1]) & columns.covers(query[2], key[2])
        return found if frames is None else found & frames.covers(query[0], key[0])

    def image_pairs(self, layout: Layout) -> int | None:
        total = 1
        for axis in self.axes(layout):
            total *= 1 if axis is None else axis.pairs()
        return total


def _check_steps(window: str, width: PerAxis, stride: PerAxis, dilation: PerAxis) -> None:
    """Raise unless stride and dilation fit ``width``, the number of keys of a window.

    Raises:
        TypeError, ValueError: they do not.
    """
    for name, given in (("stride", stride), ("dilation", dilation)):
        check_per_axis(f"{window} {name}", given)
    several = {len(given) for given in (width, stride, dilation) if not isinstance(given, int)}
    if len(several) > 1:
        raise ValueError(
            f"kernel, stride and dilation of a {window} must have the same axes, got {label(width)}, {label(stride)} and "
            f"{label(dilation)}"
        )
    count = several.pop() if several else 1
    widths, strides = (((given,) * count if isinstance(given, int) else given) for given in (width, stride))
    if any(step > keys for step, keys in zip(strides, widths, strict=True)):
        raise ValueError(
            f"{window} stride must be no larger than its {label(width)} keys along any axis, got {label(stride)}: some keys "
            "would be seen by no query"
        )


def _steps_label(stride: PerAxis, dilation: PerAxis) -> str:
    parts = (("_s", stride), ("_d", dilation))
    return "".join(prefix + label(given) for prefix, given in parts if given != 1)


def _is_plain(stride: PerAxis, dilation: PerAxis) -> bool:
    return all(n == 1 for given in (stride, dilation) for n in ((given,) if isinstance(given, int) else given))


@dataclass(frozen=True)
class Square(_ByAxis):
    r"""A square window, or a cuboid over several frames, clipped at the border.

    .. math:: \max(|y_q - y_k|, |x_q - x_k|) < r

    Args:
        radius: half side r in tokens, 1 or more, for every axis, or a tuple. The inequality is strict, as for the disc, so the
            side is 2 r - 1.
        stride: length of the runs of queries that share the window of their middle one.
        dilation: d: queries see only every d-th key, those of their own phase.

    Stride and dilation have NATTEN's semantics (arXiv 2504.16922, 2209.15001), and may be tuples.
    """

    radius: PerAxis
    stride: PerAxis = 1
    dilation: PerAxis = 1

    def __post_init__(self) -> None:
        check_per_axis("window radius r", self.radius)
        width = 2 * self.radius - 1 if isinstance(self.radius, int) else tuple(2 * r - 1 for r in self.radius)
        _check_steps("square", width, self.stride, self.dilation)

    @property
    def name(self) -> str:
        return f"square_r{label(self.radius)}{_steps_label(self.stride, self.dilation)}"

    @property
    def reads(self) -> Reads:
        return "offsets" if _is_plain(self.stride, self.dilation) else "integers"

    @property
    def reach(self) -> int:
        return _reach(self.radius, self.stride, self.dilation)

    def _size(self) -> tuple[str, PerAxis]:
        return "radius", self.radius

    def _axis(self, side: int, size: int, stride: int, dilation: int) -> Axis:
        return Axis(side, 2 * size - 1, size - 1, stride, dilation, shifted=False)

    def check(self, layout: Layout) -> None:
        self.axes(layout)
        if layout.references and not _is_plain(self.stride, self.dilation):
            raise ValueError(
                f"a square window with stride or dilation counts from the border of one grid, and this layout has "
                f"{len(layout.grids)}: {layout.grids}. Use Disc, or Square without these"
            )

    def image_pairs(self, layout: Layout) -> int | None:
        if not layout.references:
            return super().image_pairs(layout)
        _, rows, columns = self.axes(layout)
        most = max(rows.before, columns.before) + 1
        return offset_pairs(layout, most, lambda dy, dx: (dy <= rows.before) & (dx <= columns.before))


@dataclass(frozen=True)
class Neighborhood(_ByAxis):
    r"""Neighborhood attention with NATTEN's semantics: a k x k window shifted inwards at the border, so that every query has
    the same number of keys; over several frames k x k x k.

    .. math:: s(y_q) \le y_k < s(y_q) + k, \quad s(y) = \min(\max(y - \lfloor k / 2 \rfloor, 0), h - k)

    and likewise in x with w.

    Args:
        kernel: side k in tokens, 1 or more, for every axis, or a tuple. A grid smaller than the kernel is an error.
        stride: length of the runs of queries that share the window of their middle one, 1 to k (generalized neighborhood
            attention, arXiv 2504.16922).
        dilation: d: queries see only every d-th key, those of their own phase (dilated neighborhood attention, arXiv
            2209.15001). A grid smaller than kernel times dilation is an error.
    """

    kernel: PerAxis
    stride: PerAxis = 1
    dilation: PerAxis = 1

    def __post_init__(self) -> None:
        check_per_axis("neighborhood kernel", self.kernel)
        _check_steps("neighborhood", self.kernel, self.stride, self.dilation)

    @property
    def name(self) -> str:
        return f"neighborhood_k{label(self.kernel)}{_steps_label(self.stride, self.dilation)}"

    @property
    def reads(self) -> Reads:
        return "floats" if _is_plain(self.stride, self.dilation) else "integers"

    @property
    def reach(self) -> int:
        return _reach(self.kernel, self.stride, self.dilation)

    def _size(self) -> tuple[str, PerAxis]:
        return "kernel", self.kernel

    def _axis(self, side: int, size: int, stride: int, dilation: int) -> Axis:
        return Axis(side, size, size // 2, stride, dilation)

    def check(self, layout: Layout) -> None:
        if layout.references:
            raise ValueError(
                f"a neighborhood window is shifted inwards at the border of one grid, and this layout has "
                f"{len(layout.grids)}: {layout.grids}. Use Disc or Square"
            )
        axes = self.axes(layout)
        if any(axis is not None and axis.width * axis.dilation > axis.side for axis in axes):
            kernel = label(self.kernel) if not isinstance(self.kernel, int) else f"{self.kernel} x {self.kernel}"
            sides = " x ".join(map(str, layout.shape if layout.frames > 1 else layout.shape[1:]))
            dilated = "" if self.dilation == 1 else f" with dilation {label(self.dilation)}"
            raise ValueError(
                f"a neighborhood of {kernel} tokens{dilated} does not fit into a grid of {sides}: not every query could "
                "have equally many keys. Use a smaller kernel, or Square"
            )


def _reach(width: PerAxis, stride: PerAxis, dilation: PerAxis) -> int:
    """An upper bound on ``Window.reach``."""
    widest, step, phases = (
        (max(given[-2:]) if isinstance(given, tuple) else given) for given in (width, stride, dilation)
    )
    return (widest + step // 2) * phases
