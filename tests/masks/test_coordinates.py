"""Coordinates by arithmetic against the permutation, for every small grid and at random for large ones."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexclear.masks import (
    Both,
    Disc,
    Downsampled,
    Either,
    Full,
    Layout,
    Neighborhood,
    Square,
    Strided,
    Swin,
    TileWindow,
    dense_mask,
)
from flexclear.masks.coordinates import MAX_COMPUTED, can_compute, computed, float_number
from flexclear.masks.orders import ORDERS
from flexclear.masks.shapes import MAX_FLOAT_RADIUS
from flexclear.masks.windows import captured_tensors

TEXTS = ((0, True), (5, False), (7, True), (200, True), (512, True))
"""Text tokens, and whether they come first: with and without a shift against the blocks, also past the image's end."""


def check(layout):
    """Every position of the layout, in all three readings."""
    right = layout.coordinates()
    everywhere = torch.arange(layout.seq_len + 3)
    image = (everywhere >= layout.image_start) & (everywhere < layout.image_start + layout.image_len)
    for reads, dtype in (("integers", torch.int32), ("floats", torch.float32), ("offsets", torch.float32)):
        place = computed(layout, reads, "cpu")(everywhere)
        assert {axis.dtype for axis in place.at} == {dtype}
        assert torch.equal(place.is_text[: layout.seq_len], ~image[: layout.seq_len])
        assert torch.equal(place.is_pooled, everywhere >= layout.seq_len)
        frame, *across = (axis[image] for axis in place.at)
        assert torch.equal(frame, right[0].to(dtype)), (layout, reads)
        if reads == "offsets" and layout.frames == 1 and layout.order == "tiled" and layout.bands().turned:
            across.reverse()
        for found, places in zip(across, right[1:], strict=True):
            expected = places.to(dtype)
            if reads == "offsets" and layout.frames == 1:
                # Equal up to a constant and a sign, so that the distance of any two is right.
                found, expected = found - found[0], expected - expected[0]
                expected = expected if torch.equal(found, expected) else -expected
            assert torch.equal(found, expected), (layout, reads)


@pytest.mark.kept("*one text*")
@pytest.mark.parametrize("texts", [1, len(TEXTS)], ids=["one text", "all texts"])
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_every_grid_up_to_40_x_40(order, texts):
    for number, (height, width) in enumerate(itertools.product(range(1, 41), range(1, 41))):
        for text_len, text_first in (TEXTS[(number + more) % len(TEXTS)] for more in range(texts)):
            check(Layout(height, width, text_len, text_first, order))


sides = st.integers(1, 1024)


@given(sides, sides, st.integers(0, 1024), st.booleans(), st.sampled_from(sorted(ORDERS)))
def test_grids_up_to_1024_x_1024(height, width, text_len, text_first, order):
    check(Layout(height, width, text_len, text_first, order))


@pytest.mark.parametrize(
    "shape", [(2047, 2044), (1, MAX_COMPUTED // 256), (16384, 255), (255, 16384), (11, 16384)], ids=str
)
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_the_longest_sequences_that_are_computed(shape, order):
    layout = Layout(*shape, 4000, order=order)
    assert can_compute(layout, layout.seq_len)
    check(layout)


def test_what_arithmetic_does_not_know_is_looked_up():
    assert not can_compute(Layout(2048, 2048), Layout(2048, 2048).seq_len)
    assert not can_compute(Layout(4, 4, references=((4, 4),)), 544)
    tables = [t for t in captured_tensors(Disc(3).mask_mod(Layout(4, 4, references=((4, 4),)))) if t.ndim]
    assert [len(table) for table in tables] == [1 << 16]


WINDOWS = (
    Disc(3), Square(3), Neighborhood(3), Swin(3, 1), Strided(2), Full(), Both(Square(4), Disc(3)), Either(Disc(2), Swin(3)),
    Downsampled(Disc(3), 2), Disc(MAX_FLOAT_RADIUS + 1),
)  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
def test_no_window_captures_a_table(window):
    for layout in (Layout(9, 16, 5), Layout(16, 9, 5, text_first=False), Layout(9, 16, 5, order="raster")):
        assert all(tensor.ndim == 0 for tensor in captured_tensors(window.mask_mod(layout)))


@pytest.mark.parametrize(("window", "per_axis"), [(Neighborhood(3), 9), (TileWindow((2, 3, 3), 3), 3)], ids=repr)
def test_what_a_rule_captures_in_lists_and_tuples_is_found(window, per_axis):
    rule = window.rule(Layout(9, 12, 5, frames=4), float_number("cpu"))
    assert len(captured_tensors(rule)) == 3 * per_axis


@pytest.mark.parametrize("radius", [1, 90, 2048, MAX_FLOAT_RADIUS, MAX_FLOAT_RADIUS + 1, 16384, 40000])
def test_large_radii_are_compared_exactly(radius):
    """Squared distances around r^2 and far beyond 2^24, where float32 has no odd numbers left."""
    layout = Layout(1, 16384, 0, order="raster")
    mask_mod = Disc(radius).mask_mod(layout)
    near = torch.arange(layout.width)[max(radius - 3, 0) : radius + 4]
    places = torch.cat([near, torch.tensor([0, 8191, 16383])])
    assert torch.equal(mask_mod(None, None, torch.zeros(1, dtype=torch.int64), places), places < radius)
    tall = Layout(4200, 900, 0, order="raster")
    key = torch.randint(tall.seq_len, (20000,), generator=torch.Generator().manual_seed(0))
    seen = Disc(radius).mask_mod(tall)(None, None, torch.tensor([7]), key)
    assert torch.equal(seen, (key // 900) ** 2 + (key % 900 - 7) ** 2 < radius**2)


@given(st.sampled_from(WINDOWS), st.integers(5, 30), st.integers(5, 30), st.integers(0, 300), st.booleans())
def test_queries_from_a_position_on_are_the_image_tokens_there(window, height, width, text_len, text_first):
    layout = Layout(height, width, text_len, text_first)
    first = layout.image_start // 16 * 16
    queries = torch.arange(layout.image_start, layout.image_start + layout.image_len)
    keys = torch.arange(window.key_len(layout))
    right = dense_mask(layout, window)[queries]
    for mask_mod in (
        window.mask_mod(layout, queries_from=first),
        window.mask_mod_over(layout, window.key_coordinates(layout), queries_from=first),
    ):
        assert torch.equal(mask_mod(None, None, queries[:, None] - first, keys[None, :]), right)
