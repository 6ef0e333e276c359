"""Masks, token orders, pooled keys and padding against their definitions at sizes that small layouts do not reach."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexclear.masks import Disc, Downsampled, Full, Layout, Neighborhood, Square, Strided, Swin, boxes
from flexclear.testing import assert_matches_dense
from flexclear.testing.checks import MAX_DENSE_PAIRS
from flexclear.testing.strategies import block_sizes, layouts_with_windows, long_layouts, windows


def with_windows(layouts):
    return layouts.flatmap(lambda layout: st.tuples(st.just(layout), windows(layout)))


@settings(max_examples=30)
@given(layouts_with_windows(side=st.integers(1, 30)), block_sizes)
def test_small_layouts(drawn, block_size):
    assert_matches_dense(*drawn, block_size=block_size, attention=False)


@settings(max_examples=25)
@given(with_windows(long_layouts(most_references=2)), block_sizes)
def test_sides_up_to_400_with_radii_to_match(drawn, block_size):
    assert_matches_dense(*drawn, block_size=block_size, attention=False)


LONG = [
    # Distances beyond 181 and columns beyond 255; every row is compared.
    (Layout(2, 300, 5), Disc(200)),
    (Layout(300, 2, 5, False), Disc(7)),
    (Layout(3, 290, 0, order="raster"), Square(50)),
    (Layout(290, 3, 0, references=((2, 300),)), Disc(60)),
    (Layout(4, 270, 16), Neighborhood(3)),
    (Layout(4, 270, 16), Swin(100, 30)),
    (Layout(2, 400, 16), Downsampled(Disc(41), 3)),
]


@pytest.mark.parametrize("block_size", [16, (128, 64)])
@pytest.mark.parametrize(("layout", "window"), LONG, ids=str)
def test_strips(layout, window, block_size):
    assert layout.seq_len**2 <= MAX_DENSE_PAIRS
    assert_matches_dense(layout, window, block_size=block_size, attention=False)


GROUPED = [
    (Layout(130, 128, 77), Disc(9)),
    (Layout(128, 130, 77, False, "raster"), Full()),
    (Layout(4, 4200), Neighborhood(4)),
    (Layout(90, 100, 5, references=((80, 100),)), Strided(7)),
]


@pytest.mark.parametrize(("layout", "window"), GROUPED, ids=str)
def test_more_pairs_of_blocks_than_are_searched_at_once(layout, window):
    assert (-(-layout.seq_len // 16)) ** 2 > boxes._FEW_PAIRS
    assert_matches_dense(layout, window, block_size=16, attention=False)


BEYOND_16_BITS = [
    (Layout(256, 256), Disc(16)),  # FLUX.1 at 4096 x 4096 px
    (Layout(256, 260, 77, False), Downsampled(Disc(16), 4)),
    (Layout(6, 11_000, 5, order="raster"), Square(300)),
]


@pytest.mark.parametrize(("layout", "window"), BEYOND_16_BITS, ids=str)
def test_more_tokens_than_16_bits_count(layout, window):
    assert layout.seq_len > 1 << 16
    assert_matches_dense(layout, window, attention=False)
