"""Where every token of a joint text-image sequence sits: sizes, order, coordinates.

A diffusion transformer attends over ``text_len`` text tokens and ``height * width`` image tokens. ``Layout`` is the
hashable description of that sequence; everything else in this package is a pure function of it.

Three numberings appear in this package, and names keep them apart:

- *raster*: image tokens row by row, ``y * width + x``. What pipelines hand over and expect back.
- *image order*: image tokens in the order that the layout chose (``order=``).
- *sequence position*: image order with the text in front (``text_first=True``) or behind. What attention sees.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexclear.masks.checks import check_int
from flexclear.masks.defaults import independent

MAX_SIDE = 16384
"""Largest height or width in tokens. Keeps a squared distance inside 32 bits."""

BAND = 8
"""Height in tokens of a band of the tiled order: 64 consecutive tokens then cover 8 x 8."""


BLOCK = 128
"""Largest block that tiles are lined up with when the image does not start at a multiple of it."""


def _band_count(side: int) -> int:
    """Bands of 8 rows; the last one has 4 to 11, or all where there are fewer."""
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
    """How the tiled order walks a grid: bands one below the other, every other one backwards, each column by column.

    Attributes:
        count: number of bands, 1 or more.
        height: rows of every band but the last.
        last: rows of the last one.
        width: columns of each.
        turned: whether rows and columns have changed places: bands then lie side by side.
        ahead: how many places of the walk's end come first.
    """

    count: int
    height: int
    last: int
    width: int
    turned: bool
    ahead: int


def bands_of(height: int, width: int, start: int) -> Bands:
    """The bands of a grid whose first token is at sequence position ``start``. Two rules keep runs on tiles where they can be:

    - bands lie along the side that 8 divides, so that a band is a whole number of tiles;
    - where text in front shifts the image against the blocks, the end of the walk comes first, as many tokens as fill
      the block that text has begun; from the next block on, runs are tiles again.
    """
    turned = width % BAND != 0 and height % BAND == 0
    side, length = (width, height) if turned else (height, width)
    count = _band_count(side)
    return Bands(count, BAND, side - BAND * (count - 1), length, turned, -start % BLOCK % (height * width))


def _raster(height: int, width: int, start: int) -> Tensor:
    return torch.arange(height * width)


def _tiled(height: int, width: int, start: int) -> Tensor:
    """Raster index of each token when bands are walked across, every other band backwards.

    Where 8 divides the sides, each run of 64 tokens is an 8 x 8 tile and each aligned run of 128 an 8 x 16 tile (or
    two tiles at a turn). Elsewhere a run is a parallelogram of about the same area: no run is ever a long strip, and
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
class Layout:
    """A joint sequence of text and image tokens.

    >>> layout = Layout(height=64, width=64)         # 1024 x 1024 px of FLUX.1: one token covers 16 x 16 px
    >>> layout.image_len, layout.seq_len
    (4096, 4608)

    Args:
        height: rows of image tokens, 1 to 16384.
        width: columns of image tokens, 1 to 16384.
        text_len: text tokens, 0 or more.
        text_first: whether the text precedes the image (FLUX.1) or follows it (SD3).
        order: ``"tiled"`` (compact runs, see the essay in ``_tiled``) or ``"raster"`` (row by row).
        references: (height, width) of further grids whose tokens follow the image's, such as the images that an
            editing model is given. Tokens of all grids lie in one plane by their own row and column, so a window
            around a place is the same window in each grid.

    >>> Layout(64, 64, references=((48, 85),)).grids
    ((64, 64), (48, 85))

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is out of range or the order is unknown.
    """

    height: int
    width: int
    text_len: int = 512
    text_first: bool = True
    order: str = "tiled"
    references: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.references, tuple) or any(
            not isinstance(grid, tuple) or len(grid) != 2 for grid in self.references
        ):
            raise TypeError(f"Layout references must be a tuple of (height, width) tuples, got {self.references!r}")
        for number, (height, width) in enumerate(self.grids):
            which = f"Layout reference {number} " if number else "Layout "
            check_int(f"{which}height", height, 1, MAX_SIDE, "in tokens")
            check_int(f"{which}width", width, 1, MAX_SIDE, "in tokens")
        check_int("Layout text_len", self.text_len, 0, None, "in tokens")
        if not isinstance(self.text_first, bool):
            raise TypeError(f"Layout text_first must be True or False, got {self.text_first!r}")
        if self.order not in ORDERS:
            raise ValueError(f"Layout order must be one of {sorted(ORDERS)}, got {self.order!r}")

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every grid, the image's own first."""
        return ((self.height, self.width), *self.references)

    @property
    def image_len(self) -> int:
        """Number of image tokens, those of all grids."""
        return sum(height * width for height, width in self.grids)

    @property
    def seq_len(self) -> int:
        """Number of tokens, text and image."""
        return self.text_len + self.image_len

    @property
    def image_start(self) -> int:
        """Sequence position of the first image token."""
        return self.text_len if self.text_first else 0

    def bands(self) -> Bands:
        """How the tiled order walks the image's own grid."""
        return bands_of(self.height, self.width, self.image_start)

    def with_order(self, order: str) -> Layout:
        """The same tokens in another order."""
        return replace(self, order=order)

    @independent
    def permutation(self) -> Tensor:
        """Raster index of the image token at each place of the image order: int64 ``[image_len]``.

        ``tokens[:, layout.permutation()]`` brings raster tokens ``[B, image_len, C]`` into image order. Grids stay one
        after the other; each is walked by itself.
        """
        return torch.cat([walk + start for walk, start in self._walks()])

    def _walks(self) -> Iterator[tuple[Tensor, int]]:
        """Of each grid: its own raster indices in image order, and where it starts among the image tokens."""
        start = 0
        for height, width in self.grids:
            yield ORDERS[self.order](height, width, self.image_start + start), start
            start += height * width

    @independent
    def inverse_permutation(self) -> Tensor:
        """Place in the image order of each raster token: int64 ``[image_len]``; undoes ``permutation``."""
        forward = self.permutation()
        inverse = torch.empty_like(forward)
        inverse[forward] = torch.arange(len(forward))
        return inverse

    @independent
    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Row and column, in its own grid, of the token at each place of the image order: two int64 ``[image_len]``."""
        walks = [(walk, width) for (walk, _), (_, width) in zip(self._walks(), self.grids, strict=True)]
        return torch.cat([walk // width for walk, width in walks]), torch.cat([walk % width for walk, width in walks])

    def packed_coordinates(self) -> Tensor:
        """Row and column at each sequence position in one int32, ``y << 16 | x``; -1 marks text. ``[seq_len]``."""
        return _packed_coordinates(self)


@functools.lru_cache(maxsize=16)
@independent
def _packed_coordinates(layout: Layout) -> Tensor:
    y, x = layout.coordinates()
    packed = torch.full((layout.seq_len,), -1, dtype=torch.int32)
    packed[layout.image_start : layout.image_start + layout.image_len] = ((y << 16) | x).to(torch.int32)
    return packed
