"""Layouts: orders are permutations, bands are even, runs are compact."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexclear.masks import Layout
from flexclear.masks.layout import MAX_SIDE
from flexclear.masks.orders import ORDERS, band_edges
from flexclear.testing.strategies import layouts, sides


@given(layouts())
def test_a_permutation_and_its_inverse_cancel(layout):
    tokens = torch.arange(layout.image_len)
    assert torch.equal(layout.permutation().sort().values, tokens)
    assert torch.equal(layout.permutation()[layout.inverse_permutation()], tokens)


@given(layouts())
def test_packed_coordinates_hold_the_raster_index_of_every_image_token_and_mark_text(layout):
    packed = layout.packed_coordinates()
    image = packed[layout.image_start : layout.image_start + layout.image_len]
    assert torch.equal((image >> 16) * layout.width + (image & 0xFFFF), layout.permutation().int())
    assert len(packed) == layout.seq_len
    assert int((packed == -1).sum()) == layout.text_len


@given(sides)
def test_bands_cover_all_rows_and_are_8_high_but_for_the_last(height):
    edges = band_edges(height)
    heights = [b - a for a, b in itertools.pairwise(edges)]
    assert edges[0] == 0
    assert edges[-1] == height
    assert set(heights[:-1]) <= {8}
    assert min(4, height) <= heights[-1] <= 11


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 300), st.booleans())
def test_runs_are_tiles_from_the_first_whole_image_block_on_whatever_the_text_length(
    rows, columns, text_len, text_first
):
    layout = Layout(8 * rows, 16 * columns, text_len, text_first)
    packed = layout.packed_coordinates()
    first = -(-layout.image_start // 128) * 128
    runs = packed[first : layout.image_start + layout.image_len]
    runs = runs[: len(runs) // 64 * 64].view(-1, 64)
    assert ((runs >> 16).amax(1) - (runs >> 16).amin(1) == 7).all()
    assert ((runs & 0xFFFF).amax(1) - (runs & 0xFFFF).amin(1) == 7).all()


@given(st.integers(1, 8), st.integers(1, 8))
def test_runs_of_64_are_exactly_8_by_8_tiles_where_8_divides_the_sides(rows, columns):
    layout = Layout(8 * rows, 8 * columns, text_len=0)
    _, y, x = (axis.view(-1, 64) for axis in layout.coordinates())
    assert torch.equal(y.amax(1) - y.amin(1), torch.full((rows * columns,), 7))
    assert torch.equal(x.amax(1) - x.amin(1), torch.full((rows * columns,), 7))


@given(st.integers(8, 60), st.integers(8, 60), st.integers(0, 63))
def test_no_run_of_64_is_a_long_strip_whatever_the_sides(height, width, offset):
    _, y, x = Layout(height, width, text_len=0).coordinates()
    for start in range(offset, len(y) - 63, 64):
        assert int(x[start : start + 64].max() - x[start : start + 64].min()) <= 22
        assert int(y[start : start + 64].max() - y[start : start + 64].min()) <= 22


def test_neighbours_in_the_tiled_order_are_near_each_other_everywhere():
    _, y, x = Layout(45, 80, text_len=0).coordinates()
    assert int((y.diff().abs() + x.diff().abs()).max()) <= 11


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"height": 0}, ValueError, "Layout height must be an int from 1 to 16384 in tokens, got 0"),
        ({"height": MAX_SIDE + 1}, ValueError, "got 16385"),
        ({"width": 2.0}, TypeError, r"Layout width must be .*, got 2.0 \(float\)"),
        ({"width": True}, TypeError, "got True"),
        ({"text_len": -1}, ValueError, "Layout text_len must be an int >= 0 in tokens, got -1"),
        ({"text_first": "yes"}, TypeError, "text_first must be True or False, got 'yes'"),
        ({"order": "hilbert"}, ValueError, r"order must be one of \['raster', 'tiled'\], got 'hilbert'"),
    ],
)
def test_bad_layouts_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        Layout(**{"height": 4, "width": 4, **kwargs})


def test_layouts_are_hashable_facts():
    assert hash(Layout(3, 4)) == hash(Layout(3, 4))
    assert Layout(3, 4) != Layout(4, 3)
    assert {Layout(3, 4, order=order) for order in ORDERS} == {Layout(3, 4).with_order(o) for o in ORDERS}
