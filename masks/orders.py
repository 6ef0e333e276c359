"""Token orders: which raster index is at each place of the image order.

Attention works on blocks of consecutive tokens, and the work grows with the perimeter of these blocks. The tiled order
therefore walks tokens in bands, where consecutive tokens lie close together. Raster order is the alternative.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BAND = 8
"""Height in tokens of a band of the tiled order: 64 consecutive tokens then cover an 8 x 8 tile."""

BLOCK = 128
"""Largest block size with which tiles are aligned if the image does not start at a multiple of it."""

CLIP_BAND = (4, 4)
"""Frames and rows of a band in the tiled order of several frames, unless other bands suit the window better
(``flexclear.masks.suited``)."""

Order = str | tuple[int, int]
"""A name in ``ORDERS``, or frames and rows of a band in an order of several frames."""


def _band_count(side: int) -> int:
    """Number of bands of 8 rows; the last one has 4 to 11 rows, or all if there are fewer."""
    return max(side // BAND + (side % BAND >= BAND // 2), 1)


def band_edges(side: int) -> list[int]:
    """First row of every band, then ``side``.

    >>> band_edges(16)
    [0, 8, 16]
    >>> band_edges(19), band_edges(20)
    ([0, 8, 19], [0, 8, 16, 20])
    """
    return [*range(0, BAND * _band_count(side), BAND), side]


@dataclass(frozen=True)
class Bands:
    """How the tiled order walks a grid: bands one below the other, every other one backwards, each one column by column.

    Attributes:
        count: number of bands, 1 or more.
        height: rows of every band but the last.
        last: rows of the last one.
        width: columns of each band.
        turned: whether rows and columns are swapped, so that bands lie side by side.
        ahead: number of places moved from the end of the walk to its start.
    """

    count: int
    height: int
    last: int
    width: int
    turned: bool
    ahead: int


def bands_of(height: int, width: int, start: int) -> Bands:
    """The bands of a grid whose first token is at sequence position ``start``. Two rules keep runs on tiles where possible:

    - bands lie along the side that 8 divides, so that a band is a whole number of tiles;
    - if text in front shifts the image against the blocks, the end of the walk moves to its start: just enough tokens to fill
      the block that the text began. From the next block on, runs are tiles again.
    """
    turned = width % BAND != 0 and height % BAND == 0
    side, length = (width, height) if turned else (height, width)
    count = _band_count(side)
    return Bands(count, BAND, side - BAND * (count - 1), length, turned, -start % BLOCK % (height * width))


def _raster(height: int, width: int, start: int) -> Tensor:
    return torch.arange(height * width)


def _tiled(height: int, width: int, start: int) -> Tensor:
    """Raster index of each token when bands are walked across, every other band backwards.

    If 8 divides the sides, each run of 64 tokens is an 8 x 8 tile and each aligned run of 128 an 8 x 16 tile (or two
    tiles at a turn). Otherwise a run is a parallelogram of about the same area: no run is ever a long strip, and
    because the walk turns round at the border, none reaches across the image. That is why ragged sizes need no
    padding.
    """
    bands = bands_of(height, width, start)
    grid = torch.arange(height * width).view(height, width)
    grid = grid.T if bands.turned else grid
    walk = []
    for index, (top, bottom) in enumerate(itertools.pairwise(band_edges(len(grid)))):
        columns = grid[top:bottom].T
        walk.append((columns.flip(0) if index % 2 else columns).reshape(-1))
    return torch.cat(walk).roll(bands.ahead)


ORDERS: dict[str, Callable[[int, int, int], Tensor]] = {"raster": _raster, "tiled": _tiled}
"""Image orders by name: ``(height, width, sequence position of the first image token) -> int64 [height * width]``, the
raster index at each place of the order."""


@dataclass(frozen=True)
class Steps:
    """An axis cut into stretches of equal size, except for the last.

    Attributes:
        count: number of stretches, 1 or more.
        size: size of every stretch but the last.
        last: size of the last one: from half of ``size`` to less than one and a half times ``size``, or the whole axis.
    """

    count: int
    size: int
    last: int

    @classmethod
    def of(cls, side: int, size: int) -> Steps:
        """``side`` in stretches of ``size``, or in one stretch if ``size`` is larger."""
        size = min(size, side)
        count = max(side // size + (2 * (side % size) >= size), 1)
        return cls(count, size, side - size * (count - 1))

    def edges(self) -> list[int]:
        """First place of every stretch, and the axis's end."""
        starts = [number * self.size for number in range(self.count)]
        return [*starts, starts[-1] + self.last]


@dataclass(frozen=True)
class ClipBands:
    """How several frames are walked: in bands of some frames and rows, column by column, and within a column frame by frame.

    Bands of the same frames lie one below the other, and every other one is walked backwards; the next frames are walked from
    the bottom, and so on. No run of tokens reaches across the image.

    Attributes:
        frames, rows: how these axes are cut.
        width: number of columns.
    """

    frames: Steps
    rows: Steps
    width: int


def clip_bands(frames: int, height: int, width: int, order: Order) -> ClipBands:
    """The bands of a grid of several frames, for any order but ``"raster"``."""
    many, tall = CLIP_BAND if isinstance(order, str) else order
    return ClipBands(Steps.of(frames, many), Steps.of(height, tall), width)


def walk_of_clip(frames: int, height: int, width: int, order: Order) -> Tensor:
    """Raster index, ``(frame * height + row) * width + column``, of the token at each place of the order: int64."""
    grid = torch.arange(frames * height * width).view(frames, height, width)
    if order == "raster":
        return grid.view(-1)
    bands = clip_bands(frames, height, width, order)
    walk: list[Tensor] = []
    for number, (front, back) in enumerate(itertools.pairwise(bands.frames.edges())):
        some = grid[front:back].flip(1) if number % 2 else grid[front:back]
        for top, bottom in itertools.pairwise(bands.rows.edges()):
            columns = some[:, top:bottom].permute(2, 0, 1)
            walk.append((columns.flip(0) if len(walk) % 2 else columns).reshape(-1))
    return torch.cat(walk)


def place_in_walk(bands: ClipBands, frame: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Numbers that grow along the walk, for some of a grid's tokens, int64; for all tokens, their places in ``walk_of_clip``."""
    frame_edges, row_edges = (torch.tensor(steps.edges()) for steps in (bands.frames, bands.rows))
    stretch = torch.bucketize(frame, frame_edges, right=True) - 1
    height = int(row_edges[-1])
    row = torch.where(stretch % 2 == 1, height - 1 - row, row)
    band = torch.bucketize(row, row_edges, right=True) - 1
    backwards = (stretch * bands.rows.count + band) % 2 == 1
    column = torch.where(backwards, bands.width - 1 - column, column)
    depth = (frame_edges[1:] - frame_edges[:-1])[stretch]
    tall = (row_edges[1:] - row_edges[:-1])[band]
    before = frame_edges[stretch] * height * bands.width + depth * row_edges[band] * bands.width
    return before + (column * depth + frame - frame_edges[stretch]) * tall + row - row_edges[band]
