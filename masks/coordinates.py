"""Frame, row and column of the token at each sequence position, for a ``mask_mod``: by arithmetic, or from a table.

The tiled order walks bands of equal size across the image, so a few products and floors turn a position into its token's
place (``computed``). In float32 these are exact up to 2^22 tokens, and they vectorize; a table costs a gather for every
pair of a partial block. Where arithmetic does not apply, a table is used: several grids, the keys of a band of the image,
longer sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flexclear.masks.layout import Layout
from flexclear.masks.lengths import mark_static
from flexclear.masks.places import POOLED, TEXT, Coordinates, Packing

MAX_COMPUTED = 1 << 22
"""Longest sequence whose coordinates are computed: half places are exact in float32 up to twice as many."""

Reads = Literal["offsets", "floats", "integers"]
"""What a window's rule reads, cheapest first. ``"offsets"``: float32 coordinates of which only the difference between a query's
and a key's is meaningful along each axis. ``"floats"``: float32 coordinates. ``"integers"``: int32 coordinates."""


def least_convenient(all_of: Iterable[Reads]) -> Reads:
    """The kind of coordinates that serves all of these rules."""
    return max(all_of, key=get_args(Reads).index)


Source = Literal["computed", "packed", "separate"]
"""Where a ``mask_mod`` gets coordinates from. ``"computed"``: arithmetic if the layout allows it, otherwise ``"packed"``.
``"packed"``: one table for all axes, unpacked with shifts. ``"separate"``: one table per axis, for kernels in a language
without shifts (CuTe DSL: FlashAttention 4)."""


def default_source(device: torch.device | str) -> Source:
    """Computed on CPU, where a table costs a gather for every pair of a partial block. Looked up on CUDA, where it costs one load
    per row and column of a tile: the compiled kernel for sm_90 then uses 165 registers instead of 252 with arithmetic (bfloat16,
    head dim 64; 166 instead of 184 at 128), and the loop over partial blocks is a third shorter."""
    return "computed" if torch.device(device).type == "cpu" else "packed"


class Place(NamedTuple):
    """What is at some sequence positions: coordinates of image tokens, and whether a token is of another kind."""

    at: Coordinates
    is_text: Tensor
    is_pooled: Tensor


Places = Callable[[Tensor], Place]
"""Maps sequence positions to what is there."""

Number = Callable[[float], Tensor]
"""A number as a 0-d tensor: FlexAttention compiles Python numbers in, so every size would need a new graph."""


def int_number(device: torch.device | str) -> Number:
    """Numbers as int32 on ``device``."""
    return lambda number: torch.tensor(number, dtype=torch.int32, device=device)


def float_number(device: torch.device | str) -> Number:
    """Numbers as float32 on ``device``."""
    return lambda number: torch.tensor(number, dtype=torch.float32, device=device)


def can_compute(layout: Layout, key_len: int) -> bool:
    """Whether ``computed`` supports the layout and is exact for ``key_len`` positions."""
    return not layout.is_packed and not layout.references and key_len <= MAX_COMPUTED


def computed(layout: Layout, reads: Reads, device: torch.device | str, first: int | None = None) -> Places:
    """Places of a layout with one grid, of one or several frames, by arithmetic.

    Args:
        layout: the sequence.
        reads: which coordinates are wanted.
        device: where the numbers are placed.
        first: sequence position of index 0; None: position 0.
    """
    number = float_number(device)
    if layout.frames > 1:
        coordinates = _in_frames(layout, number) if layout.order == "raster" else _in_clip_bands(layout, number)
    elif layout.order == "raster":
        coordinates = _in_rows(layout, number)
    else:
        coordinates = _in_bands(layout, number, reads)
    start, stop, end = (number(n) for n in (layout.image_start, layout.image_start + layout.image_len, layout.seq_len))
    offset = None if first is None else number(first)
    text_first, whole = layout.text_first, reads == "integers"

    def place(index: Tensor) -> Place:
        position = index.to(torch.float32)
        if offset is not None:
            position = position + offset
        frame, row, column = coordinates(position)
        if whole:
            frame, row, column = frame.to(torch.int32), row.to(torch.int32), column.to(torch.int32)
        is_text = position < start if text_first else position >= stop
        return Place((frame, row, column), is_text, position >= end)

    return place


Arithmetic = Callable[[Tensor], Coordinates]
"""Maps float32 sequence positions to the float32 coordinates of image tokens."""


def _in_rows(layout: Layout, number: Number) -> Arithmetic:
    """Raster order of an image."""
    lead, width, per_token = number(0.5 - layout.image_start), number(layout.width), number(1 / layout.width)
    half = number(0.5)

    def coordinates(position: Tensor) -> Coordinates:
        place = position + lead
        row = torch.floor(place * per_token)
        return torch.zeros_like(place), row, place - row * width - half

    return coordinates


def _in_bands(layout: Layout, number: Number, reads: Reads) -> Arithmetic:
    """The tiled order of an image. Everything is counted from the last band, where the height of bands changes.

    ``column`` counts the columns of all bands one after the other. Reciprocals are rounded, so adding a half keeps every
    product away from the whole numbers at which a floor changes; at these lengths the rounding error is always smaller.
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
    exact = reads != "offsets"
    # Rules that read only offsets treat both axes alike, so one graph serves both directions.
    turned = bands.turned and exact

    def coordinates(position: Tensor) -> Coordinates:
        place = position + lead
        place = torch.where(place < least, place + image_len, place)
        column = torch.floor(place * per_place + place.clamp(min=0) * per_place_last)
        middle = column + half
        band, pair = torch.floor(middle * per_column), torch.floor(middle * per_two)
        along = (column - pair * two - turn).abs()
        across = place + (band - column) * tall + column.clamp(min=0) * missing
        if exact:
            across, along = across + top, along * sign + edge
        row, column = (along, across) if turned else (across, along)
        return torch.zeros_like(place), row, column

    return coordinates


def _in_frames(layout: Layout, number: Number) -> Arithmetic:
    """Raster order of several frames."""
    lead, half = number(0.5 - layout.image_start), number(0.5)
    height, width = layout.height, layout.width
    area, per_area = number(height * width), number(1 / (height * width))
    side, per_side = number(width), number(1 / width)

    def coordinates(position: Tensor) -> Coordinates:
        place = position + lead
        frame = torch.floor(place * per_area)
        place = place - frame * area
        row = torch.floor(place * per_side)
        return frame, row, place - row * side - half

    return coordinates


def _in_clip_bands(layout: Layout, number: Number) -> Arithmetic:
    """The tiled order of several frames: first the stretch of frames, then of rows, then the column and the place in it.

    The last stretch of an axis has another size. In a band walked backwards, columns are counted from the other end; so are the
    rows in a stretch of frames that is walked from below. A half keeps products away from whole numbers, as above.
    """
    bands, half = layout.clip_bands(), number(0.5)
    frames, rows, width = bands.frames, bands.rows, bands.width
    lead, two = number(0.5 - layout.image_start), number(2)
    area, last_frames, last_rows = number(layout.height * width), number(frames.count - 1), number(rows.count - 1)
    many, more, per_many, per_more = (
        number(n) for n in (frames.size, frames.last - frames.size, 1 / frames.size, 1 / frames.last - 1 / frames.size)
    )
    tall, taller, per_tall, per_taller = (
        number(n) for n in (rows.size, rows.last - rows.size, 1 / rows.size, 1 / rows.last - 1 / rows.size)
    )
    per_stretch, per_band = number(1 / (frames.size * layout.height * width)), number(1 / (rows.size * width))
    columns, count = number(width), number(rows.count)
    right, bottom = number(width - 1), number(layout.height - 1)

    def odd(value: Tensor) -> Tensor:
        return value - two * torch.floor(value * half)

    def coordinates(position: Tensor) -> Coordinates:
        place = position + lead
        stretch = torch.minimum(torch.floor(place * per_stretch), last_frames)
        is_last = (stretch == last_frames).to(place.dtype)
        depth, per_depth = many + is_last * more, per_many + is_last * per_more
        place = place - stretch * many * area
        band = torch.minimum(torch.floor(place * per_depth * per_band), last_rows)
        is_last = (band == last_rows).to(place.dtype)
        height, per_height = tall + is_last * taller, per_tall + is_last * per_taller
        place = place - band * tall * depth * columns
        column = torch.floor(place * per_depth * per_height)
        place = place - column * depth * height
        frame = torch.floor(place * per_height)
        row = place - frame * height - half + band * tall
        backwards, from_below = odd(stretch * count + band), odd(stretch)
        column = column + backwards * (right - two * column)
        row = row + from_below * (bottom - two * row)
        return frame + stretch * many, row, column

    return coordinates


def looked_up(keys: Tensor, packing: Packing, device: torch.device | str, source: Source = "packed") -> Places:
    """Places looked up in a table of packed coordinates.

    Args:
        keys: packed coordinates at each position, including TEXT and POOLED, int32 ``[positions]``.
        packing: how the coordinates are packed (``Layout.packing``).
        device: where the table is placed.
        source: ``"separate"`` for one table per axis, otherwise one table for all axes.
    """
    if source != "separate":
        table = coordinate_table(keys, device)

        def place(index: Tensor) -> Place:
            found = table[index]
            return Place(packing.unpack(found), found < 0, found == POOLED)

        return place
    frame, row, column = packing.unpack(keys)
    rows = coordinate_table(torch.where(keys < 0, keys, row), device)
    columns = coordinate_table(torch.where(keys < 0, 0, column), device)
    frames = coordinate_table(torch.where(keys < 0, 0, frame), device) if packing.has_frames else None

    def place_of_axes(index: Tensor) -> Place:
        row = rows[index]
        frame = torch.zeros_like(row) if frames is None else frames[index]
        return Place((frame, row, columns[index]), row < 0, row == POOLED)

    return place_of_axes


def coordinate_table(packed: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Packed coordinates padded to 2^16, 2^20, 2^22, 2^24 or 2^30 entries, int32, for a ``mask_mod`` to capture.

    The lengths are fixed and marked static so that everything else about the sequence can be dynamic: one graph serves all
    resolutions of a bucket (65,536 tokens are 4096 x 4096 px). A *dynamic* table does not even compile on CPU, where
    Inductor's C++ template replaces the name ``ks1`` inside ``ks19`` (torch 2.13).
    """
    bucket = next(1 << bits for bits in (16, 20, 22, 24, 30) if len(packed) <= 1 << bits)
    table = torch.full((bucket,), TEXT, dtype=torch.int32, device=device)
    table[: len(packed)] = packed.to(device)
    mark_static(table)
    return table
