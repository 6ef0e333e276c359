"""Pooled keys behind all other keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexclear.masks.checks import check_int
from flexclear.masks.coordinates import Number, Reads
from flexclear.masks.layout import MAX_SIDE, Layout
from flexclear.masks.places import Box
from flexclear.masks.windows import Rule, Window


@dataclass(frozen=True)
class Downsampled(Window):
    """A window with pooled keys behind all other keys (the released code's ``down_factor``; method, section 4).

    The image is cut into cells of ``factor`` x ``factor`` tokens from its upper left corner; each cell is one pooled
    key, and cells are in raster order. Image queries see all pooled keys, text queries none. If the factor does not
    divide a side, the last row or column of cells is smaller: every token is in exactly one cell, and nothing is padded.

    Args:
        window: what image queries see of the image keys.
        factor: side of a cell in tokens, 1 or more.
    """

    window: Window
    factor: int

    def __post_init__(self) -> None:
        if not isinstance(self.window, Window) or self.window.pools:
            raise TypeError(f"Downsampled takes a window without pooled keys such as Disc(8), got {self.window!r}")
        check_int("down-sampling factor", self.factor, 1, MAX_SIDE, "in tokens")

    @property
    def name(self) -> str:
        return f"{self.window.name}_down{self.factor}"

    @property
    def reads(self) -> Reads:
        return self.window.reads

    @property
    def reach(self) -> int | None:
        return self.window.reach

    @property
    def pools(self) -> bool:
        return True

    def check(self, layout: Layout) -> None:
        super().check(layout)
        if layout.is_packed:
            raise ValueError("pooled keys are defined for the grid of an image, not for a packed sequence")
        self.window.check(layout)

    def rule(self, layout: Layout, number: Number) -> Rule:
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
