"""Which rank has which part of an image, and what it needs from which other rank. Pure functions: no process, no device.

The token grid is cut into bands of lines. Lines are rows or columns, whichever are more, and cuts are at multiples of 8 lines,
so that every band begins with whole tiles of the token order. A band has the same line numbers in every grid of the layout,
including reference pictures, because a window sees the same rows and columns of all grids. Several frames are cut along rows,
columns or frames, so that windows reach across as few tokens as possible, and at any line, as their order has no tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexclear.masks import Downsampled, Layout, Window
from flexclear.masks.defaults import independent
from flexclear.masks.orders import BAND, ORDERS, band_edges, walk_of_clip
from flexclear.masks.places import Box

TOO_SMALL = ("raise", "fewer")

Run = tuple[int, int]
"""A run of lines: the first, and the one after the last."""


@dataclass(frozen=True)
class Bands:
    """Which lines each rank has.

    Attributes:
        axis: axis of ``Layout.shape``: 0 if lines are frames, 1 if rows, 2 if columns.
        edges: rank i has the lines from ``edges[i]`` up to, but not including, ``edges[i + 1]``; none if they are equal.
    """

    axis: int
    edges: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Number of ranks, including idle ones."""
        return len(self.edges) - 1

    @property
    def busy(self) -> int:
        """Number of ranks that have lines."""
        return sum(first < stop for first, stop in itertools.pairwise(self.edges))

    def run(self, rank: int) -> Run:
        """The lines of a rank."""
        return self.edges[rank], self.edges[rank + 1]


def sides(layout: Layout, axis: int) -> tuple[int, ...]:
    """Number of lines of each grid."""
    return tuple(shape[axis] for shape in shapes(layout))


def shapes(layout: Layout) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of each grid."""
    return [(layout.frames, *grid) for grid in layout.grids]


def line_sizes(layout: Layout, axis: int) -> tuple[int, ...]:
    """Number of tokens in one line of each grid."""
    return tuple(math.prod(shape) // shape[axis] for shape in shapes(layout))


def long_axis(layout: Layout) -> int:
    """Axis of an image with more lines, which keeps borders short; rows in case of a tie."""
    return 1 if max(sides(layout, 1)) >= max(sides(layout, 2)) else 2


def check_shares(shares: Sequence[float] | None, ranks: int) -> tuple[float, ...]:
    """Each rank's share of the image; None gives equal shares.

    Raises:
        ValueError: not one positive number per rank.
    """
    if shares is None:
        return (1.0,) * ranks
    given = tuple(shares)
    if len(given) != ranks or any(
        isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < float("inf") for share in given
    ):
        raise ValueError(f"shares must be one positive number for each of {ranks} ranks, got {shares!r}")
    return given


def cut(
    layout: Layout,
    ranks: int,
    shares: Sequence[float] | None = None,
    too_small: str = "raise",
    windows: Iterable[Window | None] = (),
) -> Bands:
    """Cut an image or a clip into one band per rank.

    >>> cut(Layout(64, 48), 3)
    Bands(axis=1, edges=(0, 24, 40, 64))

    Args:
        layout: the sequence.
        ranks: number of ranks.
        shares: each rank's share of the tokens, as proportions; equal by default. Bands are multiples of 8 lines, so shares
            are only met as closely as this allows.
        too_small: what to do with fewer runs of 8 lines than ranks: ``"raise"``, or ``"fewer"``: the last ranks get no
            lines.
        windows: windows of the layers; with several frames, the axis of the cuts depends on how far they reach.

    Raises:
        ValueError: the grid is too small, or an argument is invalid.
    """
    if too_small not in TOO_SMALL:
        raise ValueError(f"too_small must be one of {list(TOO_SMALL)}, got {too_small!r}")
    wanted = check_shares(shares, ranks)
    if layout.frames > 1:
        return _cut_clip(layout, ranks, wanted, too_small, set(windows))
    axis = long_axis(layout)
    units = band_edges(max(sides(layout, axis)))
    if len(units) <= ranks:
        return _fewer(layout, axis, units, wanted, too_small, f"bands of {BAND} lines along its longer side")
    return _cut_along(layout, axis, units, wanted)


def _cut_clip(
    layout: Layout, ranks: int, wanted: tuple[float, ...], too_small: str, windows: set[Window | None]
) -> Bands:
    """Cut several frames along the axis with the fewest tokens to send; a tie goes to rows, then columns, then frames."""
    found = []
    for axis in (1, 2, 0):
        units = [*range(layout.shape[axis] + 1)]
        if len(units) <= ranks and layout.shape[axis] < max(layout.shape):
            continue
        if len(units) <= ranks:
            return _fewer(layout, axis, units, wanted, too_small, "lines along its longest side")
        bands = _cut_along(layout, axis, units, wanted)
        size = line_sizes(layout, axis)[0]
        sent = sum(
            size * (stop - first)
            for window in windows
            for runs in borders(layout, window, bands).values()
            for first, stop in runs
        )
        found.append((sent, bands))
    return min(found, key=lambda pair: pair[0])[1]


def _fewer(
    layout: Layout, axis: int, units: Sequence[int], wanted: tuple[float, ...], too_small: str, what: str
) -> Bands:
    """Bands for as many ranks as there are units.

    Raises:
        ValueError: ``too_small`` is ``"raise"``.
    """
    ranks, count = len(wanted), len(units) - 1
    if count < ranks and too_small == "raise":
        sides = " x ".join(map(str, layout.shape if layout.frames > 1 else layout.shape[1:]))
        raise ValueError(
            f"an image of {sides} tokens has {count} {what}, too few for {ranks} ranks. Use at most {count} ranks, a larger "
            "image, or flexclear.parallel.enable(..., too_small='fewer'), which leaves the others idle"
        )
    busy = _cut_along(layout, axis, units, wanted[:count])
    return Bands(axis, busy.edges + (units[-1],) * (ranks - count))


def _cut_along(layout: Layout, axis: int, units: Sequence[int], wanted: tuple[float, ...]) -> Bands:
    """Bands of whole units, whose numbers of tokens are as close to the wanted shares as units allow."""
    ranks, count = len(wanted), len(units) - 1
    # Number of tokens before each unit, over all grids.
    before = [
        sum(min(line, side) * size for side, size in zip(sides(layout, axis), line_sizes(layout, axis), strict=True))
        for line in units
    ]
    total = sum(wanted)
    chosen = [0]
    for rank in range(1, ranks):
        target = before[-1] * sum(wanted[:rank]) / total
        least, most = chosen[-1] + 1, count - (ranks - rank)
        chosen.append(min(range(least, most + 1), key=lambda unit: (abs(before[unit] - target), -unit)))
    return Bands(axis, tuple(units[unit] for unit in (*chosen, count)))


@independent
def reached(layout: Layout, window: Window | None, bands: Bands, rank: int) -> Tensor:
    """Lines with keys that the rank's image queries may see, bool ``[lines]``; ``window`` None is dense attention.

    This asks the window itself, box by box, and so works for every window: a disc reaches r - 1 lines to either side, a
    shifted neighborhood may see lines on one side only, strided attention may need all lines.
    """
    count = bands.edges[-1]
    first, stop = bands.run(rank)
    if first == stop:
        return torch.zeros(count, dtype=torch.bool)
    if window is None:
        return torch.ones(count, dtype=torch.bool)
    number = torch.arange(count, dtype=torch.int32)
    most = [max(sides(layout, axis)) - 1 for axis in range(3)]

    def box(first: Tensor, last: Tensor) -> Box:
        frames, rows, columns = (
            (first, last) if axis == bands.axis else (torch.zeros_like(first), torch.full_like(first, most[axis]))
            for axis in range(3)
        )
        return frames, rows, columns

    query = torch.full_like(number, first), torch.full_like(number, stop - 1)
    return window.touches(layout, box(*query), box(number, number))


def runs_of(lines: Tensor) -> tuple[Run, ...]:
    """The runs of consecutive True in a bool tensor."""
    number = torch.nonzero(lines)[:, 0].tolist()
    runs = []
    for _, group in itertools.groupby(enumerate(number), lambda pair: pair[1] - pair[0]):
        members = [line for _, line in group]
        runs.append((members[0], members[-1] + 1))
    return tuple(runs)


def borders(layout: Layout, window: Window | None, bands: Bands) -> dict[tuple[int, int], tuple[Run, ...]]:
    """The lines sent from one rank to another, by (source, destination); pairs without any are left out."""
    found = {}
    for destination in range(bands.ranks):
        needed = reached(layout, window, bands, destination)
        for source in range(bands.ranks):
            first, stop = bands.run(source)
            if source != destination and bool(needed[first:stop].any()):
                theirs = torch.zeros_like(needed)
                theirs[first:stop] = needed[first:stop]
                found[source, destination] = runs_of(theirs)
    return found


@independent
def tokens_in(layout: Layout, axis: int, runs: Sequence[Run], start: int = 0) -> Tensor:
    """Raster indices of the image tokens in some lines, in the layout's kind of order: int64.

    Tokens come grid by grid and run by run; each is a rectangle with its own walk. ``start`` is the number of tokens that
    precede them in their sequence, with which tiles are aligned.
    """
    found = []
    offset = 0
    for shape in shapes(layout):
        for first, stop in runs:
            stop = min(stop, shape[axis])
            if first >= stop:
                continue
            frames, height, width = (stop - first if number == axis else side for number, side in enumerate(shape))
            if layout.frames > 1:
                walk = walk_of_clip(frames, height, width, layout.order)
            else:
                walk = ORDERS[str(layout.order)](height, width, start)
            places = [walk // (height * width), walk // width % height, walk % width]
            places[axis] = places[axis] + first
            found.append(offset + (places[0] * shape[1] + places[1]) * shape[2] + places[2])
            start += len(walk)
        offset += math.prod(shape)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


@independent
def packed_raster(layout: Layout) -> Tensor:
    """Packed coordinates of every image token by raster index (``Layout.packing``), int32 ``[image_len]``."""
    parts = []
    for frames, height, width in shapes(layout):
        place = torch.arange(frames * height * width)
        parts.append(layout.packing.pack(place // (height * width), place // width % height, place % width))
    return torch.cat(parts).to(torch.int32)


@dataclass(frozen=True, eq=False)
class Cells:
    """The pooled keys to which a rank contributes (method, section 4).

    Attributes:
        numbers: cells, in the numbering of ``Downsampled``, int64 ``[n]``.
        members: place in the rank's own order of each cell's tokens, int64 ``[n, d * d]``; arbitrary for missing tokens.
        share: factor on each member, float32 ``[n, d * d]``: 0 for tokens outside the image or of another rank, and as in
            ``flexclear.runtime.pooling.Pooling`` for the others.
    """

    numbers: Tensor
    members: Tensor
    share: Tensor


@independent
def cells_of(layout: Layout, window: Downsampled, own: Tensor) -> Cells:
    """The cells that hold some of a rank's tokens. ``own`` gives these by raster index, in the rank's order.

    A cell that lies in two bands is in the ``Cells`` of both ranks, and the ranks' pooled parts add up.
    """
    factor = window.factor
    height, width = layout.height, layout.width
    columns = window.pooled_grid(layout)[1]
    y, x = own // width, own % width
    numbers, cell = torch.unique(y // factor * columns + x // factor, return_inverse=True)
    place = y % factor * factor + x % factor
    members = torch.zeros(len(numbers), factor * factor, dtype=torch.int64)
    members[cell, place] = torch.arange(len(own))
    share = torch.zeros(len(numbers), factor * factor)
    rows_in = (height - y // factor * factor).clamp(max=factor)
    columns_in = (width - x // factor * factor).clamp(max=factor)
    share[cell, place] = factor * factor / (rows_in * columns_in).float()
    return Cells(numbers, members, share)


@dataclass(frozen=True, eq=False)
class Part:
    """What one rank has of an image under one window.

    Attributes:
        layout, window, bands, rank: the arguments of ``part_of``.
        own: raster index of each of the rank's image tokens, in its order, int64 ``[n]``.
        sends: for each destination, the places in that order of the tokens sent there.
        halo: raster indices of the tokens received from other ranks, one rank after the other, int64.
        receives: for each source, the number of tokens received from it, in the same order.
        cells: cells of every rank if there are pooled keys; else empty.
    """

    layout: Layout
    window: Window | None
    bands: Bands
    rank: int
    own: Tensor
    sends: dict[int, Tensor]
    halo: Tensor
    receives: dict[int, int]
    cells: tuple[Cells, ...] = ()


def own_tokens(layout: Layout, bands: Bands, rank: int) -> Tensor:
    """Raster index of each of a rank's image tokens, in its order: int64 ``[n]``."""
    return tokens_in(layout, bands.axis, (bands.run(rank),))


@independent
def part_of(layout: Layout, window: Window | None, bands: Bands, rank: int) -> Part:
    """Everything a rank must know about an image under a window; see ``Part``."""
    own = own_tokens(layout, bands, rank)
    place = torch.empty(layout.image_len, dtype=torch.int64)
    place[own] = torch.arange(len(own))
    exchanged = borders(layout, window, bands)

    def border(source: int, destination: int) -> Tensor:
        return tokens_in(layout, bands.axis, exchanged[source, destination])

    others = [other for other in range(bands.ranks) if other != rank]
    incoming = {source: border(source, rank) for source in others if (source, rank) in exchanged}
    sends = {other: place[border(rank, other)] for other in others if (rank, other) in exchanged}
    incoming = {source: tokens for source, tokens in incoming.items() if len(tokens)}
    cells: tuple[Cells, ...] = ()
    if isinstance(window, Downsampled):
        cells = tuple(cells_of(layout, window, own_tokens(layout, bands, other)) for other in range(bands.ranks))
    return Part(
        layout=layout,
        window=window,
        bands=bands,
        rank=rank,
        own=own,
        sends={other: places for other, places in sends.items() if len(places)},
        halo=torch.cat([*incoming.values(), torch.zeros(0, dtype=torch.int64)]),
        receives={source: len(tokens) for source, tokens in incoming.items()},
        cells=cells,
    )


@independent
def gathered_order(layout: Layout, bands: Bands) -> Tensor:
    """Place of each raster token in the concatenation of all ranks' own tokens: int64 ``[image_len]``."""
    lined_up = torch.cat([own_tokens(layout, bands, rank) for rank in range(bands.ranks)])
    inverse = torch.empty_like(lined_up)
    inverse[lined_up] = torch.arange(len(lined_up))
    return inverse
