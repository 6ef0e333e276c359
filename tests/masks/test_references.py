"""Layouts with reference grids: one plane, one window, several images."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexclear.masks import Disc, Downsampled, Layout, Neighborhood, block_mask, block_pairs, cost, dense_mask
from flexclear.runtime.reach import warn_of_unreached
from flexclear.testing import assert_matches_dense
from flexclear.testing.strategies import block_sizes, layouts, layouts_with_windows, radii

several = layouts(side=st.integers(1, 14), most_references=3)
drawn_over_several = layouts_with_windows(side=st.integers(1, 14), most_references=3)


@given(several, radii)
def test_the_dense_reference_equals_a_double_loop_over_all_grids(layout, r):
    raster = [(y, x) for height, width in layout.grids for y in range(height) for x in range(width)]
    start = layout.text_len if layout.text_first else 0
    place = [None] * layout.seq_len
    place[start : start + layout.image_len] = [raster[index] for index in layout.permutation().tolist()]
    mask = dense_mask(layout, Disc(r)).tolist()
    for i, a in enumerate(place):
        for j, b in enumerate(place):
            near = a is None or b is None or (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < r * r
            assert mask[i][j] == near, (i, j)


@settings(max_examples=40)
@given(drawn_over_several, block_sizes)
def test_the_block_mask_means_what_the_definition_means(drawn, block_size):
    layout, window = drawn
    assert_matches_dense(layout, window, block_size=block_size, attention=False)


@given(drawn_over_several)
def test_the_cost_counts_the_pairs_of_all_grids(drawn):
    layout, window = drawn
    assert cost(layout, window).pairs == int(dense_mask(layout, window).sum())


@given(several)
def test_each_grid_is_walked_by_itself(layout):
    start = 0
    permutation = layout.permutation()
    for height, width in layout.grids:
        part = permutation[start : start + height * width]
        assert torch.equal(part.sort().values, torch.arange(start, start + height * width))
        start += height * width


def test_a_place_sees_the_disc_around_it_in_the_other_picture_too():
    layout = Layout(8, 8, 0, order="raster", references=((8, 8),))
    seen = dense_mask(layout, Disc(2))[3 * 8 + 3]
    places = torch.nonzero(seen)[:, 0].tolist()
    disc = [8 * y + x for y in (2, 3, 4) for x in (2, 3, 4)]  # dy^2 + dx^2 < 4
    assert places == [*disc, *(64 + p for p in disc)]


@pytest.mark.parametrize(
    ("reference", "hidden"),
    [((20, 8), False), ((5, 30), True), ((15, 30), False), ((14, 30), True), ((20, 3), False), ((20, 2), True)],
)
def test_a_reference_that_the_far_corner_does_not_see_is_warned_of(reference, hidden):
    layout = Layout(20, 8, 0, references=(reference,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_unreached(layout, Disc(6))
    assert len(caught) == hidden


def test_two_equal_grids_of_a_large_picture_stay_sparse():
    layout = Layout(64, 64, 512, references=((64, 64),))
    pairs = block_pairs(layout, Disc(16))
    assert cost(layout, Disc(16)).amplification < 1.65
    assert pairs.skipped_count > len(pairs.q)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Neighborhood(3), r"shifted inwards at the border of one grid, and this layout has 2: \(\(8, 8\), \(4, 4\)\)"),
        (Downsampled(Disc(3), 2), "pooled keys are defined for one grid, and this layout has 2"),
    ],
)
def test_a_window_without_a_meaning_on_several_grids_is_refused(window, message):
    layout = Layout(8, 8, 4, references=((4, 4),))
    for use in (block_mask, dense_mask, cost):
        with pytest.raises(ValueError, match=message):
            use(layout, window)


@pytest.mark.parametrize(
    ("references", "error", "message"),
    [
        ([(4, 4)], TypeError, r"references must be a tuple of \(height, width\) tuples, got \[\(4, 4\)\]"),
        ((4, 4), TypeError, r"got \(4, 4\)"),
        (((4, 0),), ValueError, "Layout reference 1 width must be an int from 1 to 16384 in tokens, got 0"),
        (((2.0, 4),), TypeError, r"Layout reference 1 height must be .* got 2.0 \(float\)"),
    ],
)
def test_references_that_make_no_sense_are_named(references, error, message):
    with pytest.raises(error, match=message):
        Layout(4, 4, references=references)
