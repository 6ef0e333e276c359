"""Layouts of packed sequences, whose tokens say where they are."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexclear.compile.kernels import Kernel
from flexclear.masks import (
    Anchors,
    Disc,
    Downsampled,
    Full,
    Layout,
    Neighborhood,
    Square,
    TileWindow,
    Tube,
    block_mask,
    cost,
    cylinder,
    dense_mask,
    radial,
    suited,
)
from flexclear.masks.orders import clip_bands, place_in_walk, walk_of_clip
from flexclear.runtime.plan import build_plan
from flexclear.testing.lists import assert_lists
from flexclear.testing.oracle import sees
from flexclear.testing.strategies import windows

CPU = torch.device("cpu")


@st.composite
def packed(draw):
    """Positions, which are local, and a window: some of a grid's places, from anywhere, in any order, others in between."""
    frames, height, width = (draw(st.integers(1, most)) for most in (5, 9, 12))
    grid = torch.cartesian_prod(*(torch.arange(side) for side in (frames, height, width)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    kept = grid[torch.rand(len(grid), generator=generator) >= draw(st.sampled_from([0, 0.2]))]
    kept = kept if len(kept) else grid
    if draw(st.booleans()):
        kept = kept[torch.randperm(len(kept), generator=generator)]
    others = draw(st.integers(0, 20))
    local = torch.ones(len(kept) + others, dtype=torch.bool)
    local[torch.randperm(len(local), generator=generator)[:others]] = False
    positions = torch.randint(-99, 99, (len(local), 3), generator=generator)
    positions[local] = kept + torch.tensor(draw(st.tuples(*[st.integers(-50, 5000)] * 3)))
    layout = Layout.from_positions(positions, local)
    return positions, local, layout, draw(windows(Layout(*layout.shape[1:], frames=layout.frames)))


@settings(max_examples=60)
@given(packed(), st.sampled_from([16, (32, 16), (128, 64)]), st.sampled_from(["raster", "tiled", (2, 3)]))
def test_masks_mean_what_the_positions_mean(drawn, block_size, order):
    positions, local, layout, window = drawn
    if isinstance(window, Downsampled):
        with pytest.raises(ValueError, match="not for a packed sequence"):
            block_mask(layout, window)
        return
    layout = layout.with_order(order if layout.frames > 1 or isinstance(order, str) else "tiled")
    whole = layout.whole_permutation()
    assert torch.equal(whole.sort().values, torch.arange(layout.seq_len))
    places = (positions - positions[local].amin(0))[whole].numpy()
    query, key = (tuple(places[:, axis].reshape(shape) for axis in range(3)) for shape in ((-1, 1), (1, -1)))
    text = ~local[whole]
    right = text[:, None] | text[None, :]
    clipped = [axis.clip(0, side - 1) for axes in (query, key) for axis, side in zip(axes, layout.shape, strict=True)]
    right = right | torch.from_numpy(sees(window, layout, tuple(clipped[:3]), tuple(clipped[3:])).copy())
    assert torch.equal(dense_mask(layout, window), right)
    mask = block_mask(layout, window, block_size=block_size, backward=True)
    index = torch.arange(layout.seq_len)
    assert torch.equal(mask.mask_mod(None, None, index[:, None], index[None]).expand(right.shape), right)
    assert_lists(mask, right)
    assert cost(layout, window).pairs == int(right.sum())


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(1, 9))
def test_the_walk_of_a_whole_grid_is_that_of_a_clip(frames, height, width, many, tall):
    order = (many, tall)
    walk = walk_of_clip(frames, height, width, order)
    places = walk // (height * width), walk // width % height, walk % width
    assert torch.equal(place_in_walk(clip_bands(frames, height, width, order), *places), torch.arange(len(walk)))


def grid_positions(frames, height, width, others=3):
    grid = torch.cartesian_prod(*(torch.arange(side) for side in (frames, height, width)))
    local = torch.cat([torch.zeros(others, dtype=torch.bool), torch.ones(len(grid), dtype=torch.bool)])
    return torch.cat([torch.zeros(others, 3, dtype=torch.long), grid]), local


def test_a_packed_layout_is_a_value_and_suits_its_window():
    positions, local = grid_positions(9, 12, 20)
    layout = Layout.from_positions(positions, local)
    again = Layout.from_positions((positions + 40).to(torch.int32), local)
    assert layout == again
    assert hash(layout) == hash(again)
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert layout.is_full
    window = Tube((9,), repeat_last=True)
    assert suited(layout, window).order == (9, 2)
    assert layout != Layout.from_positions(positions.flip(0), local.flip(0))


@pytest.mark.parametrize("order", ["raster", "tiled"])
def test_a_plan_brings_tokens_there_and_back(order):
    positions, local = grid_positions(3, 4, 5)
    positions, local = torch.cat([positions[3:], positions[:3]]), torch.cat([local[3:], local[:3]]).roll(2)
    positions = positions.roll(2, 0)
    layout = Layout.from_positions(positions, local).with_order(order)
    plan = build_plan(layout, cylinder(3, 1), "sdpa", Kernel((16, 16)), CPU, backward=False)
    there, back = plan.whole_order
    assert torch.equal(there[back], torch.arange(layout.seq_len))
    at = positions[there[: layout.image_len]]
    near = ((at[:, None, 1:] - at[None, :, 1:]) ** 2).sum(-1) < 9
    near &= (at[:, None, 0] - at[None, :, 0]).abs() <= 1
    assert torch.equal(plan.mask[: layout.image_len, : layout.image_len], near)


P, LOCAL = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 1]]), torch.tensor([True, True, False])
BAD = [
    (P.float(), LOCAL, TypeError, "must be whole numbers, got torch.float32"),
    (P, LOCAL.int(), TypeError, "local must be bool"),
    (P[:, :1], LOCAL, ValueError, r"\[N, 3\] .* got \[3, 1\] and \[3\]"),
    (P, LOCAL[:2], ValueError, r"got \[3, 3\] and \[2\]"),
    (P, ~LOCAL & False, ValueError, "none of 3 packed tokens"),
    (P, LOCAL | True, ValueError, r"repeat: 2 tokens are at \(0, 0, 1\)"),
    (P * 20000, LOCAL, ValueError, "Layout width must be"),
]  # fmt: skip


@pytest.mark.parametrize(("positions", "local", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_positions_are_named(positions, local, error, message):
    with pytest.raises(error, match=message):
        Layout.from_positions(positions, local)


def test_rows_and_columns_alone_are_an_image():
    positions, local = grid_positions(1, 6, 7)
    layout = Layout.from_positions(positions[:, 1:], local)
    assert layout.shape == (1, 6, 7)
    for window in (Disc(3), Neighborhood(3), Square(2), TileWindow(2, 3), Anchors((0,)), radial(3), Full()):
        assert cost(layout, window).pairs == cost(Layout(6, 7, 3), window).pairs
