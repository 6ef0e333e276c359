"""Other masks over a video: sliding tiles, for comparison, and frames that all queries see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexclear.masks.checks import check_int
from flexclear.masks.coordinates import Number
from flexclear.masks.layout import MAX_CLIP_SIDE, Layout
from flexclear.masks.lengths import mark_static
from flexclear.masks.neighborhoods import PerAxis, check_per_axis, label, per_axis
from flexclear.masks.places import Box, Coordinates, Interval
from flexclear.masks.windows import Rule, Window


@dataclass(frozen=True)
class TileWindow(Window):
    """Sliding tiles: queries of a tile see the tiles around it, as many at the border as elsewhere (Sliding Tile Attention,
    arXiv 2502.04507). If the tile does not divide a side, the last tile is smaller.

    Args:
        tile: side of a tile in tokens, for every axis, or a tuple.
        window: number of tiles seen along each axis, odd; if an axis has fewer, all are seen.
    """

    tile: PerAxis
    window: PerAxis

    def __post_init__(self) -> None:
        check_per_axis("tile", self.tile)
        check_per_axis("window of tiles", self.window)
        if any(n % 2 == 0 for n in ((self.window,) if isinstance(self.window, int) else self.window)):
            raise ValueError(f"a window of tiles must be odd along every axis, got {label(self.window)}")

    @property
    def name(self) -> str:
        return f"tiles_{label(self.tile)}_w{label(self.window)}"

    @property
    def knows_frames(self) -> bool:
        return True

    def check(self, layout: Layout) -> None:
        self._axes(layout)
        if layout.references:
            raise ValueError(f"sliding tiles lie in one grid, and this layout has {len(layout.grids)}: {layout.grids}")

    def _axes(self, layout: Layout) -> list[tuple[int, int, int, int]]:
        """For each axis that matters: its number, a tile's side, how many tiles windows reach to each side, and the number of
        the last tile on which a window is centered."""
        found = []
        sizes = zip(per_axis("tile", self.tile, layout), per_axis("window", self.window, layout), strict=True)
        for axis, (side, (tile, window)) in enumerate(zip(layout.shape, sizes, strict=True)):
            if tile is not None and window is not None:
                half = window // 2
                found.append((axis, tile, half, max(-(-side // tile) - 1 - half, half)))
        return found

    def rule(self, layout: Layout, number: Number) -> Rule:
        axes = [(axis, number(tile), number(half), number(last)) for axis, tile, half, last in self._axes(layout)]

        def inside(query: Coordinates, key: Coordinates) -> Tensor:
            allowed = None
            for axis, tile, half, last in axes:
                centre = torch.minimum(torch.maximum(query[axis] // tile, half), last)
                near = (key[axis] // tile - centre).abs() <= half
                allowed = near if allowed is None else allowed & near
            assert allowed is not None
            return allowed

        return inside

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        found = None
        for axis, tile, half, last in self._axes(layout):
            (low, high), (first, end) = _tiles(query[axis], tile), _tiles(key[axis], tile)
            meets = (first <= high.clamp(half, last) + half) & (end >= low.clamp(half, last) - half) & (low <= high)
            found = meets if found is None else found & meets
        assert found is not None
        return found

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        found = None
        for axis, tile, half, last in self._axes(layout):
            (low, high), (first, end) = _tiles(query[axis], tile), _tiles(key[axis], tile)
            holds = (first >= high.clamp(half, last) - half) & (end <= low.clamp(half, last) + half)
            found = holds if found is None else found & holds
        assert found is not None
        return found

    def image_pairs(self, layout: Layout) -> int | None:
        total = 1
        sides = dict(enumerate(layout.shape))
        for axis, tile, half, last in self._axes(layout):
            own = torch.arange(sides.pop(axis)) // tile
            in_tile = own.bincount()
            before = torch.cat([in_tile.new_zeros(1), in_tile.cumsum(0)])
            centre = own.clamp(half, last)
            total *= int((before[(centre + half + 1).clamp(max=len(in_tile))] - before[centre - half]).sum())
        for side in sides.values():
            total *= side**2
        return total


def _tiles(interval: Interval, tile: int) -> Interval:
    return interval[0] // tile, interval[1] // tile


@dataclass(frozen=True)
class Anchors(Window):
    """Frames that all queries see: ``cylinder(16, 4) | Anchors((0,))`` keeps the first frame in sight.

    Args:
        frames: frame numbers, counted from 0, each at most once.
    """

    frames: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.frames, tuple) or not self.frames:
            raise TypeError(f"Anchors takes a tuple of frame numbers such as (0,), got {self.frames!r}")
        for number in self.frames:
            check_int("frame of Anchors", number, 0, MAX_CLIP_SIDE - 1)
        if len(set(self.frames)) < len(self.frames):
            raise ValueError(f"Anchors names a frame twice: {self.frames}")

    @property
    def name(self) -> str:
        return f"anchors_{'_'.join(map(str, self.frames))}"

    @property
    def knows_frames(self) -> bool:
        return True

    def check(self, layout: Layout) -> None:
        if max(self.frames) >= layout.frames:
            raise ValueError(
                f"Anchors({self.frames}) names a frame that this layout of {layout.frames} frames does not have"
            )

    def _marked(self, count: int) -> list[int]:
        return [int(number in self.frames) for number in range(count)]

    def rule(self, layout: Layout, number: Number) -> Rule:
        like = number(1)
        table = torch.tensor(self._marked(MAX_CLIP_SIDE), dtype=torch.bool, device=like.device)
        mark_static(table)
        return lambda query, key: table[key[0].to(torch.int32)] & (query[1] + key[1] >= query[1] + key[1])

    def _count(self, layout: Layout, key: Box) -> Tensor:
        """How many of a box's frames are anchors."""
        before = torch.tensor([0, *self._marked(layout.frames)], dtype=torch.int32).cumsum(0)
        first, last = (edge.clamp(0, layout.frames - 1).long() for edge in key[0])
        return before[last + 1] - before[first]

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        some = (self._count(layout, key) > 0) & (key[0][0] <= key[0][1])
        return some & (query[0][0] <= query[0][1])

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        every = self._count(layout, key) == key[0][1] - key[0][0] + 1
        return every & (query[0][0] <= query[0][1])

    def image_pairs(self, layout: Layout) -> int | None:
        return len(self.frames) * (layout.image_len // layout.frames) * layout.image_len
