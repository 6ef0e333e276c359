"""Row and column of the token at each sequence position, for a ``mask_mod``: by arithmetic, or from a table.

The tiled order walks bands of equal height across the image, so a position says by a few products and floors where its
token lies (``computed``). In float32 these are exact up to 2^22 tokens, and they vectorise; a table is a gather for every
pair of a partial block. What no arithmetic knows is looked up: several grids, the keys of a band of the image, longer
sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flexclear.masks.layout import Layout
from flexclear.masks.lengths import mark_static

TEXT, POOLED, PADDING = -1, -2, -3
"""What a coordinate table holds in place of ``y << 16 | x`` for tokens that are no image tokens."""

MAX_COMPUTED = 1 << 22
"""Longest sequence whose coordinates are computed: half places are exact in float32 up to twice as many."""

Reads = Literal["offsets", "floats", "integers"]
"""What a window's rule reads, the most convenient first: float32 coordinates of which only the distance between a query's and
a key's means something along each axis; float32 coordinates; int32 coordinates."""


def least_convenient(all_of: Iterable[Reads]) -> Reads:
    """What serves rules that read each of these."""
    return max(all_of, key=get_args(Reads).index)


Source = Literal["computed", "packed", "separate"]
"""Where a ``mask_mod`` has coordinates from: arithmetic where there is one for the layout, else as ``"packed"``; a table of both
together, taken apart with a shift; a table of each, for kernels in a language without shifts (CuTe DSL: FlashAttention 4)."""


def default_source(device: torch.device | str) -> Source:
    """Computed on CPU, where a table is a gather for every pair of a partial block. Looked up on CUDA, where it is one load for
    every row and column of a tile: the compiled kernel for sm_90 has 165 registers then, and 252 with arithmetic (bfloat16, head
    dim 64; 166 and 184 at 128), and the loop over partial blocks is a third shorter."""
    return "computed" if torch.device(device).type == "cpu" else "packed"


class Place(NamedTuple):
    """What is at some sequence positions: row and column of image tokens, and whether it is something else."""

    row: Tensor
    column: Tensor
    is_text: Tensor
    is_pooled: Tensor


Places = Callable[[Tensor], Place]
"""Sequence positions to what is there."""

Number = Callable[[float], Tensor]
"""A number as a 0-d tensor: FlexAttention compiles Python numbers in, and every size would be a new graph."""


def int_number(device: torch.device | str) -> Number:
    """Numbers as int32 on ``device``."""
    return lambda number: torch.tensor(number, dtype=torch.int32, device=device)


def float_number(device: torch.device | str) -> Number:
    """Numbers as float32 on ``device``."""
    return lambda number: torch.tensor(number, dtype=torch.float32, device=device)


def can_compute(layout: Layout, key_len: int) -> bool:
    """Whether ``computed`` knows the layout's positions and is exact on ``key_len`` of them."""
    return not layout.references and key_len <= MAX_COMPUTED


def computed(layout: Layout, reads: Reads, device: torch.device | str, first: int | None = None) -> Places:
    """Positions of a layout of one grid, by arithmetic.

    Args:
        layout: the sequence.
        reads: which coordinates are wanted.
        device: where the numbers are put.
        first: sequence position that is asked for as 0; None: it is position 0.
    """
    number = float_number(device)
    in_rows = layout.order == "raster"
    coordinates = _in_rows(layout, number) if in_rows else _in_bands(layout, number, exact=reads != "offsets")
    turned = not in_rows and layout.bands().turned
    start, stop, end = (number(n) for n in (layout.image_start, layout.image_start + layout.image_len, layout.seq_len))
    offset = None if first is None else number(first)
    text_first, whole = layout.text_first, reads == "integers"

    def place(index: Tensor) -> Place:
        position = index.to(torch.float32)
        if offset is not None:
            position = position + offset
        row, column = coordinates(position)
        if whole:
            row, column = row.to(torch.int32), column.to(torch.int32)
        is_text = position < start if text_first else position >= stop
        return Place(row, column, is_text, position >= end)

    def turned_place(index: Tensor) -> Place:
        column, row, *others = place(index)
        return Place(row, column, *others)

    # Offsets are the same along either axis to the rules that read no more than these, and one graph serves both ways.
    return turned_place if turned and reads != "offsets" else place


Coordinates = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Float32 positions to the coordinates across and along the walk."""


def _in_rows(layout: Layout, number: Number) -> Coordinates:
    """Raster order."""
    lead, width, per_token = number(0.5 - layout.image_start), number(layout.width), number(1 / layout.width)
    half = number(0.5)

    def coordinates(position: Tensor) -> tuple[Tensor, Tensor]:
        place = position + lead
        row = torch.floor(place * per_token)
        return row, place - row * width - half

    return coordinates


def _in_bands(layout: Layout, number: Number, exact: bool) -> Coordinates:
    """The tiled order. Everything is counted from the last band, where the height of bands changes.

    ``column`` counts the columns of all bands one after the other. A half keeps every product away from the whole numbers
    at which a floor changes: reciprocals are rounded, by less than the half is apart at these lengths.
    """
    bands = layout.bands()
    count, height, last, width = bands.count, bands.height, bands.last, bands.width
    before = (count - 1) * height * width
    lead, least, image_len = (
        number(0.5 - bands.ahead - layout.image_start - before),
        number(-before),
        number(layout.image_len),
    )
    per_place, per_place_last = number(1 / height), number(1 / last - 1 / height)
    tall, missing, half = number(height), number(height - last), number(0.5)
    per_column, per_two, two, turn = (number(n) for n in (1 / width, 0.5 / width, 2 * width, width - 0.5))
    top = number((count - 1) * height - 0.5)
    forwards = count % 2 == 1  # whether the last band is walked forwards
    edge, sign = number(width - 0.5 if forwards else -0.5), number(-1.0 if forwards else 1.0)

    def coordinates(position: Tensor) -> tuple[Tensor, Tensor]:
        place = position + lead
        place = torch.where(place < least, place + image_len, place)
        column = torch.floor(place * per_place + place.clamp(min=0) * per_place_last)
        middle = column + half
        band, pair = torch.floor(middle * per_column), torch.floor(middle * per_two)
        along = (column - pair * two - turn).abs()
        across = place + (band - column) * tall + column.clamp(min=0) * missing
        return (across + top, along * sign + edge) if exact else (across, along)

    return coordinates


def looked_up(keys: Tensor, device: torch.device | str, source: Source = "packed") -> Places:
    """Positions whose packed coordinates are given, TEXT and POOLED among them, int32 ``[positions]``.

    Args:
        keys: ``y << 16 | x`` of each.
        device: where the table is put.
        source: ``"separate"``, or a table of both.
    """
    if source != "separate":
        table = coordinate_table(keys, device)

        def place(index: Tensor) -> Place:
            found = table[index]
            return Place(found >> 16, found & 0xFFFF, found < 0, found == POOLED)

        return place
    rows = coordinate_table(torch.where(keys < 0, keys, keys >> 16), device)
    columns = coordinate_table(keys & 0xFFFF, device)

    def place_of_two(index: Tensor) -> Place:
        row = rows[index]
        return Place(row, columns[index], row < 0, row == POOLED)

    return place_of_two


def coordinate_table(packed: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Packed coordinates padded to 2^16, 2^20, 2^22, 2^24 or 2^30 entries, int32, for a ``mask_mod`` to capture.

    Why the fixed lengths, marked static: everything else about the sequence can be dynamic, so that one graph serves all
    resolutions of a bucket (65,536 tokens is 4096 x 4096 px); and a *dynamic* table does not even compile on CPU, where
    Inductor's C++ template replaces the name ``ks1`` inside ``ks19`` (torch 2.13).
    """
    bucket = next(1 << bits for bits in (16, 20, 22, 24, 30) if len(packed) <= 1 << bits)
    table = torch.full((bucket,), TEXT, dtype=torch.int32, device=device)
    table[: len(packed)] = packed.to(device)
    mark_static(table)
    return table
