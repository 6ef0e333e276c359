"""Windows made of windows: both, either, and pooled keys behind the image keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flexclear.masks.checks import check_int
from flexclear.masks.layout import MAX_SIDE, Layout
from flexclear.masks.windows import Box, Rule, Window


def _check_parts(verb: str, parts: tuple[Window, ...]) -> None:
    if len(parts) < 2:
        raise ValueError(f"{verb} takes two windows or more, got {len(parts)}")
    for part in parts:
        if not isinstance(part, Window):
            raise TypeError(f"{verb} takes windows of flexclear.masks such as Disc(16), got {part!r}")
        if isinstance(part, Downsampled):
            raise TypeError(
                f"{verb} takes windows without pooled keys; add them last: Downsampled({verb}(...), factor)"
            )


@dataclass(frozen=True, init=False, repr=False)
class Both(Window):
    """A key is seen if every part allows it: the intersection of windows.

    Args:
        parts: two windows or more, without pooled keys.
    """

    parts: tuple[Window, ...]

    def __init__(self, *parts: Window) -> None:
        _check_parts("Both", parts)
        object.__setattr__(self, "parts", parts)

    def __repr__(self) -> str:
        return f"Both({', '.join(map(repr, self.parts))})"

    @property
    def name(self) -> str:
        return "_and_".join(part.name for part in self.parts)

    def rule(self, layout: Layout, number: Callable[[int], Tensor]) -> Rule:
        first, *others = (part.rule(layout, number) for part in self.parts)
        for other in others:
            first = _and(first, other)
        return first

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        found = self.parts[0].touches(layout, query, key)
        for part in self.parts[1:]:
            found = found & part.touches(layout, query, key)
        return found

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        found = self.parts[0].covers(layout, query, key)
        for part in self.parts[1:]:
            found = found & part.covers(layout, query, key)
        return found


@dataclass(frozen=True, init=False, repr=False)
class Either(Window):
    """A key is seen if any part allows it: the union of windows.

    Args:
        parts: two windows or more, without pooled keys.
    """

    parts: tuple[Window, ...]

    def __init__(self, *parts: Window) -> None:
        _check_parts("Either", parts)
        object.__setattr__(self, "parts", parts)

    def __repr__(self) -> str:
        return f"Either({', '.join(map(repr, self.parts))})"

    @property
    def name(self) -> str:
        return "_or_".join(part.name for part in self.parts)

    def rule(self, layout: Layout, number: Callable[[int], Tensor]) -> Rule:
        first, *others = (part.rule(layout, number) for part in self.parts)
        for other in others:
            first = _or(first, other)
        return first

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        found = self.parts[0].touches(layout, query, key)
        for part in self.parts[1:]:
            found = found | part.touches(layout, query, key)
        return found

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        found = self.parts[0].covers(layout, query, key)
        for part in self.parts[1:]:
            found = found | part.covers(layout, query, key)
        return found


def _and(a: Rule, b: Rule) -> Rule:
    return lambda y_q, x_q, y_k, x_k: a(y_q, x_q, y_k, x_k) & b(y_q, x_q, y_k, x_k)


def _or(a: Rule, b: Rule) -> Rule:
    return lambda y_q, x_q, y_k, x_k: a(y_q, x_q, y_k, x_k) | b(y_q, x_q, y_k, x_k)


@dataclass(frozen=True)
class Downsampled(Window):
    """A window with pooled keys behind all other keys (the released code's ``down_factor``; method, section 4).

    The image is cut into cells of ``factor`` x ``factor`` tokens from its upper left corner; each cell is one pooled
    key, cells in raster order. Image queries see all pooled keys, text queries none. Where the factor does not divide
    a side, the last row or column of cells is smaller: every token is in exactly one cell and none is padded.

    Args:
        window: what image queries see of the image keys.
        factor: side of a cell in tokens, 1 or more.
    """

    window: Window
    factor: int

    def __post_init__(self) -> None:
        if not isinstance(self.window, Window) or isinstance(self.window, Downsampled):
            raise TypeError(f"Downsampled takes a window without pooled keys such as Disc(8), got {self.window!r}")
        check_int("down-sampling factor", self.factor, 1, MAX_SIDE, "in tokens")

    @property
    def name(self) -> str:
        return f"{self.window.name}_down{self.factor}"

    def rule(self, layout: Layout, number: Callable[[int], Tensor]) -> Rule:
        return self.window.rule(layout, number)

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        return self.window.touches(layout, query, key)

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        return self.window.covers(layout, query, key)

    def image_pairs(self, layout: Layout) -> int | None:
        return self.window.image_pairs(layout)

    def pooled_grid(self, layout: Layout) -> tuple[int, int]:
        if layout.references:
            raise ValueError(
                f"pooled keys are defined for one grid, and this layout has {len(layout.grids)}: {layout.grids}"
            )
        return -(-layout.height // self.factor), -(-layout.width // self.factor)
