"""Masks in three dimensions: layouts of several frames, windows over them, their order, and what they execute."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexclear.masks import (
    Anchors,
    Both,
    Disc,
    Downsampled,
    Full,
    Layout,
    Neighborhood,
    Strided,
    Swin,
    TileWindow,
    Tube,
    all_frames,
    ball,
    block_mask,
    block_pairs,
    cost,
    cylinder,
    dense_mask,
    radial,
    suited,
)
from flexclear.masks.apart import text_apart
from flexclear.masks.coordinates import computed
from flexclear.masks.layout import MAX_CLIP_SIDE
from flexclear.masks.pictures import QUERY, SEEN, UNSEEN, window_picture
from flexclear.masks.shapes import MAX_FLOAT_RADIUS
from flexclear.testing import assert_matches_dense, strategies
from flexclear.testing.lists import blocks_of

WAN_720P = Layout(45, 80, text_len=0, frames=21)


@settings(max_examples=60)
@given(strategies.clips().flatmap(lambda layout: st.tuples(st.just(layout), strategies.windows(layout))),
       strategies.block_sizes)  # fmt: skip
def test_masks_mean_what_the_definitions_mean(drawn, block_size):
    assert_matches_dense(*drawn, block_size=block_size, attention=False)


@settings(max_examples=40)
@given(strategies.clips(), st.data())
def test_blocks_that_are_cuboids_are_classified_exactly(layout, data):
    """Where every block is a cuboid, here a row of one frame, the lists are those that asking all pairs gives."""
    layout = Layout(layout.height, 16, 0, order=(1, 1), frames=layout.frames)
    window = data.draw(strategies.windows(layout, ["tube", "tilewindow", "anchors"]))
    pairs = block_pairs(layout, window, 16)
    blocks = blocks_of(dense_mask(layout, window), (16, 16))
    found, full = torch.zeros(2, pairs.q_blocks, pairs.kv_blocks, dtype=torch.bool)
    found[pairs.q, pairs.kv] = True
    full[pairs.q[pairs.full], pairs.kv[pairs.full]] = True
    assert torch.equal(found, blocks.any(-1).any(-1))
    assert torch.equal(full, blocks.all(-1).all(-1))


def test_a_block_of_several_frames_is_full_only_where_the_farthest_see_each_other():
    """Blocks of 2 frames x 4 rows x 2 columns, and a radius that is larger than the frame."""
    pairs = block_pairs(Layout(4, 4, 0, frames=8, order=(2, 4)), cylinder(40, 2), 16)
    found = {(int(q), int(kv)): bool(full) for q, kv, full in zip(pairs.q, pairs.kv, pairs.full, strict=True)}
    assert found == {
        (q, kv): abs(q // 2 - kv // 2) == 0 for q in range(8) for kv in range(8) if abs(q // 2 - kv // 2) < 2
    }


ATTENDED = [
    (Layout(9, 8, 0, frames=4, order=(2, 3)), ball(4, 2), 128),
    (Layout(7, 7, 30, False, frames=3), radial(4), 64),
]


@pytest.mark.kept("Layout(height=7*")
@pytest.mark.parametrize(("layout", "window", "head_dim"), ATTENDED, ids=str)
def test_compiled_attention(layout, window, head_dim):
    assert_matches_dense(layout, window, block_size=32, head_dim=head_dim)


def test_an_image_is_one_frame_and_a_tube_over_it_a_disc():
    layout = Layout(13, 17, 5)
    assert layout == Layout(13, 17, 5, frames=1)
    for window in (cylinder(4, 3), all_frames(4), ball(4, 2), radial(4)):
        assert torch.equal(dense_mask(layout, window), dense_mask(layout, Disc(4)))
        assert cost(layout, window).pairs == cost(layout, Disc(4)).pairs


def test_what_each_factory_sees():
    assert cylinder(16, 4) == Tube((256,) * 5)
    assert all_frames(8) == Tube((64,), repeat_last=True)
    assert ball(16, 4) == Tube((256, 240, 192, 112))
    assert radial(32) == Tube((32**2, 32**2, 16**2, 16**2, *[8**2] * 4, *[4**2] * 8, *[2**2] * 16, 1), repeat_last=True)
    layout = Layout(40, 40, 0, frames=41, order="raster")
    middle = (20 * 40 + 20) * 40 + 20
    for window, seen in ((cylinder(3, 2), 5), (all_frames(3), 41), (ball(9, 3), 5), (radial(8), 41)):
        row = ball_like(layout, window, middle)
        assert int(row.flatten(1).any(1).sum()) == seen, window


def ball_like(layout, window, query):
    """What one query sees, bool [frames, rows, columns]."""
    mask_mod = window.mask_mod(layout)
    keys = torch.arange(layout.seq_len)
    return mask_mod(None, None, torch.tensor(query), keys).view(layout.shape)


def test_windows_are_values():
    for window in (cylinder(16, 4), radial(32), TileWindow((6, 8, 8), 3), Anchors((0, 5)), Neighborhood((3, 5, 7), 2)):
        assert pickle.loads(pickle.dumps(window)) == window
        assert hash(pickle.loads(pickle.dumps(window))) == hash(window)
        assert eval(repr(window)) == window


@pytest.mark.parametrize(
    "window", [Disc(4), Swin(4), Strided(2), Downsampled(Full(), 2), Both(Disc(4), Full())], ids=repr
)
def test_windows_of_images_are_refused_over_frames(window):
    for make in (dense_mask, block_mask, cost, suited):
        with pytest.raises(ValueError, match=r"is for images and does not say which of 3 frames .* cylinder\(r"):
            make(Layout(8, 8, 5, frames=3), window)


BAD = [
    (lambda: Tube([9]), TypeError, "must be a tuple of ints"),
    (lambda: Tube(()), ValueError, "needs 1 to 1024 squared_radii, got 0"),
    (lambda: Tube((9, 16)), ValueError, "must never increase"),
    (lambda: Tube((9, 0)), ValueError, "squared radius 1 frames away .* got 0"),
    (lambda: Tube((9,), 1), TypeError, "repeat_last must be True or False"),
    (lambda: cylinder(0, 1), ValueError, "window radius r"),
    (lambda: cylinder(4, -1), ValueError, "frame_radius .*got -1"),
    (lambda: ball(4, 0), ValueError, "frame_scale"),
    (lambda: Layout(8, 8, frames=0), ValueError, "Layout frames must be .*1"),
    (lambda: Layout(8, 8, frames=1025), ValueError, "Layout frames"),
    (lambda: Layout(1025, 8, frames=2), ValueError, "Layout height .*1024"),
    (lambda: Layout(8, 8, frames=2, references=((4, 4),)), ValueError, "references .* 2 frames"),
    (lambda: Layout(8, 8, order=(4, 4)), ValueError, "need several frames"),
    (lambda: Layout(8, 8, frames=4, order=(0, 4)), ValueError, "frames of a band"),
    (lambda: Layout(8, 8, frames=4, order=(4,)), TypeError, r"a pair \(frames, rows\)"),
    (lambda: Neighborhood((3, 5)).check(Layout(8, 8, frames=4)), ValueError, "covers rows and columns only, .* has 4"),
    (lambda: Neighborhood((5, 3, 3)).check(Layout(8, 8, frames=4)), ValueError, "does not fit into a grid of 4 x 8 x 8"),
    (lambda: Neighborhood(3, dilation=3).check(Layout(8, 8)), ValueError, "with dilation 3 does not fit"),
    (lambda: Neighborhood(3, stride=4), ValueError, "stride must be no larger"),
    (lambda: Neighborhood((3, 3), stride=(1, 1, 1)), ValueError, "must have the same axes"),
    (lambda: Neighborhood((3,)), TypeError, r"\(frames, rows, columns\), got \(3,\)"),
    (lambda: TileWindow(4, 2), ValueError, "must be odd"),
    (lambda: Anchors(()), TypeError, "tuple of frame numbers"),
    (lambda: Anchors((0, 0)), ValueError, "names a frame twice"),
    (lambda: Anchors((4,)).check(Layout(8, 8, frames=4)), ValueError, "does not have"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Executed over useful, (128, 64) blocks: raster order, 4 x 4 tiles, and what ours must not exceed.
BARS = [(cylinder(16, 4), 3.6, 2.1), (all_frames(8), 7.9, 1.6), (ball(16, 4), 4.2, 2.7), (radial(32), 3.6, 2.55)]


@pytest.mark.parametrize(("window", "raster", "bar"), BARS, ids=lambda value: getattr(value, "name", str(value)))
def test_the_order_that_is_chosen_executes_little(window, raster, bar):
    assert cost(suited(WAN_720P, window), window, block_size=(128, 64)).amplification <= bar
    assert cost(WAN_720P.with_order("raster"), window, block_size=(128, 64)).amplification >= raster


@pytest.mark.parametrize("layout", [Layout(31, 53, 0, frames=13), Layout(45, 80, 256, False, frames=33)], ids=str)
def test_odd_shapes_execute_little_too(layout):
    for window, bar in ((cylinder(16, 4), 2.6), (all_frames(8), 2.3)):
        found = cost(suited(layout, window), window, block_size=(128, 64)).amplification
        assert found <= bar
        assert found < cost(layout.with_order("raster"), window, block_size=(128, 64)).amplification / 1.3


def test_no_order_is_chosen_where_it_is_given_or_all_the_same():
    image, raster, bands = (
        Layout(16, 16),
        Layout(16, 16, frames=4, order="raster"),
        Layout(16, 16, frames=4, order=(2, 2)),
    )
    for layout in (image, raster, bands):
        assert suited(layout, cylinder(4, 1)) is layout
    assert suited(WAN_720P, None) is WAN_720P


def test_sliding_tiles_of_the_same_coverage_execute_more():
    """Whole tiles of the padded grid, as that method runs; both see whatever is within the tube everywhere."""
    window = cylinder(16, 4)
    padded = Layout(48, 80, text_len=0, frames=24)
    tiles = TileWindow((6, 8, 8), (3, 5, 5))
    executed = cost(padded.with_order("raster"), tiles).pairs
    assert executed > 2 * cost(suited(WAN_720P, window), window, block_size=(128, 64)).executed_pairs


def test_counts_of_long_clips_are_exact_without_pairs():
    layout = Layout(30, 52, 0, frames=300)
    window = ball(9, 3)
    expected = sum(
        (300 - dt) * (1 + (dt > 0)) * cost(Layout(30, 52, 0), Tube((81 - 9 * dt * dt,))).pairs for dt in range(3)
    )
    assert cost(layout, window).pairs == expected


def check_coordinates(layout):
    places = torch.arange(layout.seq_len)
    image = (places >= layout.image_start) & (places < layout.image_start + layout.image_len)
    found = computed(layout, "integers", "cpu")(places)
    assert torch.equal(found.is_text, ~image)
    for axis, right in zip(found.at, layout.coordinates(), strict=True):
        assert torch.equal(axis[image], right.int()), layout


def test_coordinates_of_every_small_clip():
    for frames, height, width in itertools.product(range(2, 8), range(1, 9), range(1, 8)):
        for order in ("raster", "tiled", (1, 1), (2, 3), (3, 2), (frames, 2)):
            check_coordinates(Layout(height, width, 3 * (width % 2), height % 2 == 0, order, frames=frames))


@settings(max_examples=40)
@given(
    st.integers(2, 40), st.integers(1, 200), st.integers(1, 200), st.integers(1, 40), st.integers(1, 200), st.booleans()
)
def test_coordinates_of_clips_in_any_bands(frames, height, width, many, tall, text_first):
    check_coordinates(Layout(height, width, 77, text_first, (many, tall), frames=frames))


@pytest.mark.parametrize(
    "shape",
    [(1024, 64, 63), (4, 1024, 1023), (21, 440, 440), (1024, 1, 1024), (1024, 1024, 3), (2, 1023, 1024)],
    ids=str,
)
@pytest.mark.parametrize("order", ["raster", "tiled", (1024, 2), (3, 7), (6, 1)], ids=str)
def test_coordinates_of_the_longest_clips(shape, order):
    frames, height, width = shape
    check_coordinates(Layout(height, width, 500, order=order, frames=frames))


def test_far_offsets_are_compared_exactly():
    """Beyond 2^24 float32 has no odd numbers left; squared distances in time and space reach 2^21."""
    layout = Layout(1, MAX_CLIP_SIDE, 0, frames=MAX_CLIP_SIDE, order="raster")
    for squares in (
        (1023**2 + 1,) * 4,
        (MAX_FLOAT_RADIUS**2,) * 4,
        (MAX_FLOAT_RADIUS**2 + 1,),
        (1023**2, 1023**2 - 2046),
    ):
        window = Tube(squares)
        seen = window.mask_mod(layout)(None, None, torch.tensor(0), torch.arange(layout.seq_len)).view(layout.shape)
        away = torch.arange(MAX_CLIP_SIDE)
        for dt, square in enumerate((*squares, 0)):
            assert torch.equal(seen[dt, 0], away**2 < square), (window, dt)


def test_text_may_be_attended_apart():
    layout = suited(Layout(9, 14, 40, frames=4), cylinder(4, 1))
    apart = text_apart(layout, cylinder(4, 1), block_size=(32, 32))
    whole = dense_mask(layout, cylinder(4, 1))
    rows = torch.arange(32, layout.seq_len)
    asked = apart.image.mask_mod(None, None, (rows - 32)[:, None], torch.arange(layout.seq_len)[None])
    assert torch.equal(asked[8:], whole[rows[8:]])


def test_a_window_is_a_strip_of_frames():
    layout = Layout(7, 9, frames=3)
    picture = window_picture(layout, cylinder(3, 1), (0, 3, 4))
    assert picture.shape == (7, 3 * 10 - 1, 3)
    assert picture[3, 4].tolist() == list(QUERY)
    assert picture[3, 10 + 4].tolist() == list(SEEN)
    assert picture[3, 20 + 4].tolist() == list(UNSEEN)
    assert picture[:, 9].tolist() == [[255] * 3] * 7
    with pytest.raises(ValueError, match=r"\(frame, row, column\) on the grid of 3 x 7 x 9, got \(3, 4\)"):
        window_picture(layout, cylinder(3, 1), (3, 4))
