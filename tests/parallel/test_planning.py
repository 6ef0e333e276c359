"""Who has which tokens and who needs them, against windows asked pair by pair."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexclear.compile.kernels import Kernel
from flexclear.families.zimage_pads import room_for
from flexclear.masks import (
    Both,
    Disc,
    Downsampled,
    Layout,
    Neighborhood,
    Square,
    Strided,
    Swin,
    all_frames,
    block_mask,
    cylinder,
    dense_mask,
)
from flexclear.masks.orders import BAND
from flexclear.parallel.masks import build_band_plan, dense_band_mask, key_tokens, part_of_size
from flexclear.parallel.planning import (
    Bands,
    borders,
    cells_of,
    cut,
    gathered_order,
    own_tokens,
    part_of,
    reached,
    runs_of,
    sides,
)
from flexclear.runtime.pooling import make_pooling
from flexclear.testing.strategies import clips
from flexclear.testing.strategies import windows as all_windows

CPU = torch.device("cpu")

windows = st.one_of(
    st.integers(1, 40).map(Disc),
    st.integers(1, 12).map(Square),
    st.integers(1, 8).map(Neighborhood),
    st.tuples(st.integers(2, 9), st.integers(0, 1)).map(lambda ws: Swin(*ws)),
    st.integers(1, 5).map(Strided),
    st.integers(2, 9).map(lambda r: Both(Disc(r), Square(3))),
)


@st.composite
def pictures(draw, references=True, least=8):
    """A layout, and a number of ranks that it is large enough for."""
    height, width = draw(st.integers(least, 44)), draw(st.integers(least, 44))
    others = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=2)) if references else []
    order = draw(st.sampled_from(["tiled", "raster"]))
    layout = Layout(height, width, draw(st.integers(0, 9)), draw(st.booleans()), order, tuple(others))
    most = max(1, (max(max(sides(layout, 1)), max(sides(layout, 2))) + 4) // BAND)
    return layout, draw(st.integers(1, min(most, 8)))


@given(pictures(), st.data())
def test_bands_are_whole_tiles_along_the_longer_side_and_hold_every_token_once(picture, data):
    layout, ranks = picture
    shares = data.draw(st.none() | st.lists(st.floats(0.1, 9), min_size=ranks, max_size=ranks))
    bands = cut(layout, ranks, shares)
    longest = max(sides(layout, bands.axis))
    assert longest >= max(sides(layout, 3 - bands.axis))
    assert bands.edges[0] == 0
    assert bands.edges[-1] == longest
    assert all(a < b for a, b in zip(bands.edges, bands.edges[1:], strict=False)), "every rank has lines"
    assert all(edge % BAND == 0 for edge in bands.edges[:-1])
    own = [own_tokens(layout, bands, rank) for rank in range(ranks)]
    assert torch.equal(torch.cat(own).sort().values, torch.arange(layout.image_len))
    assert [part_of_size(layout, bands, rank) for rank in range(ranks)] == [len(tokens) for tokens in own]
    assert torch.equal(torch.cat(own)[gathered_order(layout, bands)], torch.arange(layout.image_len))


@given(st.integers(1, 16), st.integers(1, 200))
def test_equal_bands_differ_by_one_tile_at_most(ranks, units):
    if units < ranks:
        return
    edges = cut(Layout(units * BAND, 8), ranks).edges
    sizes = [(b - a) // BAND for a, b in itertools.pairwise(edges)]
    assert max(sizes) - min(sizes) <= 1


def test_shares_are_met_as_well_as_tiles_allow():
    assert cut(Layout(64, 8), 3, (2, 1, 1)).edges == (0, 32, 48, 64)
    assert cut(Layout(8, 80), 2, (1, 4)) == Bands(2, (0, 16, 80))
    assert cut(Layout(32, 8), 4, (100, 1, 1, 1)).edges == (0, 8, 16, 24, 32), "each rank has one tile at least"


def test_a_longer_reference_picture_is_cut_too():
    layout = Layout(16, 16, references=((64, 16),))
    bands = cut(layout, 2)
    assert bands.edges == (0, 24, 64), "the lines that both images have count twice"
    assert part_of_size(layout, bands, 0) == 16 * 16 + 24 * 16


@settings(max_examples=40)
@given(pictures(), windows, st.data())
def test_what_a_rank_receives_is_what_its_queries_may_see_elsewhere(picture, window, data):
    layout, ranks = picture
    if isinstance(window, Neighborhood) and (layout.references or window.kernel > min(layout.height, layout.width)):
        return
    bands = cut(layout, ranks)
    rank = data.draw(st.integers(0, ranks - 1))
    part = part_of(layout, window, bands, rank)
    raster = Layout(layout.height, layout.width, 0, True, "raster", layout.references)
    seen = dense_mask(raster, window)[part.own].any(0)
    elsewhere = torch.ones(layout.image_len, dtype=torch.bool)
    elsewhere[part.own] = False
    received = torch.zeros(layout.image_len, dtype=torch.bool)
    received[part.halo] = True
    assert len(part.halo) == int(received.sum()), "nothing comes twice"
    assert not (seen & elsewhere & ~received).any(), "a key is missing"
    assert not (received & ~elsewhere).any(), "a rank has its own keys"
    for source, count in part.receives.items():
        theirs = part_of(layout, window, bands, source)
        sent = theirs.own[theirs.sends[rank]]
        start = sum(n for other, n in part.receives.items() if other < source)
        assert torch.equal(part.halo[start : start + count], sent), "both sides mean the same tokens in the same order"


@given(st.integers(1, 40), st.integers(2, 8), st.integers(8, 30))
def test_a_disc_reaches_one_line_less_than_its_radius_and_as_many_neighbours_as_that_takes(r, ranks, width):
    layout = Layout(ranks * BAND, min(width, ranks * BAND))
    bands = cut(layout, ranks)
    for rank in range(ranks):
        first, stop = bands.run(rank)
        lines = reached(layout, Disc(r), bands, rank)
        assert runs_of(lines) == ((max(first - r + 1, 0), min(stop + r - 1, layout.height)),)
    neighbours = -(-(r - 1) // BAND)
    assert all(abs(a - b) <= neighbours for a, b in borders(layout, Disc(r), bands))
    assert len(borders(layout, Disc(1), bands)) == 0
    assert len(borders(layout, None, bands)) == ranks * (ranks - 1), "dense attention needs all of all"


@settings(max_examples=40)
@given(pictures(), windows, st.data())
def test_a_ranks_mask_is_its_rows_of_the_whole_mask(picture, window, data):
    layout, ranks = picture
    if isinstance(window, Neighborhood) and (layout.references or window.kernel > min(layout.height, layout.width)):
        return
    if not layout.references and data.draw(st.booleans()):
        window = Downsampled(window, data.draw(st.integers(1, 7)))
    bands = cut(layout, ranks)
    part = part_of(layout, window, bands, data.draw(st.integers(0, ranks - 1)))
    whole = Layout(layout.height, layout.width, layout.text_len, True, "raster", layout.references)
    expected = dense_mask(whole, window)[whole.text_len + part.own]
    text, pooled = torch.arange(whole.text_len), torch.arange(whole.seq_len, expected.shape[1])
    columns = torch.cat([whole.text_len + part.own, text, whole.text_len + part.halo, pooled])
    assert torch.equal(dense_band_mask(part), expected[:, columns])
    left_out = torch.ones(expected.shape[1], dtype=torch.bool)
    left_out[columns] = False
    assert not expected[:, left_out].any()


@settings(max_examples=25)
@given(pictures(), windows, st.data())
def test_a_ranks_block_mask_holds_the_same_pairs_as_its_dense_one(picture, window, data):
    layout, ranks = picture
    if isinstance(window, Neighborhood) and (layout.references or window.kernel > min(layout.height, layout.width)):
        return
    bands = cut(layout, ranks)
    rank = data.draw(st.integers(0, ranks - 1))
    plan = build_band_plan(layout, window, bands, rank, "flex", Kernel((16, 32)), CPU)
    dense = dense_band_mask(plan.part)
    queries, keys = dense.shape
    assert plan.mask.shape == (1, 1, queries, keys)
    q, kv = torch.arange(queries)[:, None], torch.arange(keys)[None]
    assert torch.equal(plan.mask.mask_mod(torch.tensor(0), torch.tensor(0), q, kv).expand(queries, keys), dense)
    listed = torch.zeros(-(-queries // 16), -(-keys // 32))
    for counts, indices, value in (
        (plan.mask.kv_num_blocks, plan.mask.kv_indices, 1.0),
        (plan.mask.full_kv_num_blocks, plan.mask.full_kv_indices, 2.0),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            listed[row, indices[0, 0, row, :count].long()] = value
    blocks = listed.repeat_interleave(16, 0).repeat_interleave(32, 1)[:queries, :keys]
    assert not (dense & (blocks == 0)).any(), "a block with pairs is skipped"
    assert dense[blocks == 2].all(), "a block that is called full has a hole"


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_padded_text_is_left_out_of_a_ranks_keys(backend):
    layout, keep = Layout(32, 16, 9), torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    bands = cut(layout, 2)
    plan = build_band_plan(layout, Disc(5), bands, 1, backend, Kernel((16, 32)), CPU, text_padded=True)
    own = len(plan.part.own)
    expected = dense_band_mask(plan.part).repeat(2, 1, 1)
    expected[:, :, own : own + 9] &= keep[:, None]
    mask = plan.masked(keep)
    for sample in range(2):
        if backend == "sdpa":
            found = mask[sample, 0]
        else:
            q, kv = (torch.arange(length) for length in expected.shape[1:])
            found = mask.mask_mod(torch.tensor(sample), torch.tensor(0), q[:, None], kv[None])
        assert torch.equal(found, expected[sample])


@settings(max_examples=40)
@given(pictures(references=False), st.integers(1, 9))
def test_what_the_ranks_pool_adds_up_to_the_pooled_keys_of_the_whole_picture(picture, factor):
    layout, ranks = picture
    window = Downsampled(Disc(2), factor)
    bands = cut(layout, ranks)
    raster = torch.randn(layout.image_len, dtype=torch.float64)
    weight = torch.randn(factor * factor, dtype=torch.float64)
    pooling = make_pooling(layout, factor, CPU)
    in_order = raster[layout.permutation()]
    expected = (in_order[pooling.members].view(pooling.share.shape) * pooling.share * weight).sum(1)
    found = torch.zeros_like(expected)
    for rank in range(ranks):
        own = own_tokens(layout, bands, rank)
        cells = cells_of(layout, window, own)
        found[cells.numbers] += (raster[own][cells.members] * cells.share * weight).sum(1)
    assert torch.allclose(found, expected, atol=1e-5)


@settings(max_examples=40)
@given(clips(), st.integers(1, 4), st.data())
def test_clips_are_cut_at_any_line_and_a_rank_gets_what_its_queries_see(layout, ranks, data):
    window = data.draw(all_windows(layout))
    if max(layout.shape) < ranks:
        with pytest.raises(ValueError, match=f"too few for {ranks} ranks"):
            cut(layout, ranks)
        return
    bands = cut(layout, ranks, windows=[window])
    assert bands.edges[-1] == layout.shape[bands.axis]
    raster = dense_mask(Layout(*layout.shape[1:], 0, order="raster", frames=layout.frames), window)
    own = [own_tokens(layout, bands, rank) for rank in range(ranks)]
    assert torch.equal(torch.cat(own)[gathered_order(layout, bands)], torch.arange(layout.image_len))
    for rank, tokens in enumerate(own):
        part = part_of(layout, window, bands, rank)
        seen = raster[tokens].any(0)
        seen[tokens] = False
        received = torch.zeros_like(seen)
        received[part.halo] = True
        assert not (seen & ~received).any()
        assert part_of_size(layout, bands, rank) == len(tokens)
        plan = build_band_plan(layout, window, bands, rank, "flex", Kernel((16, 16)), CPU)
        keys = torch.cat([tokens, part.halo])
        here = torch.cat([torch.arange(len(tokens)), len(tokens) + layout.text_len + torch.arange(len(part.halo))])
        asked = plan.mask.mask_mod(None, None, torch.arange(len(tokens))[:, None], here[None])
        assert torch.equal(asked.expand(len(tokens), len(keys)), raster[tokens][:, keys])


def test_a_clip_is_cut_where_the_window_lets_the_least_pass():
    layout = Layout(45, 80, 0, frames=21)
    assert cut(layout, 2, windows=[cylinder(16, 4)]).axis == 2, "15 of 80 columns, of 21 x 45 each"
    assert cut(layout, 2, windows=[cylinder(16, 1)]).axis == 0, "one frame"
    assert cut(layout, 2, windows=[all_frames(8)]).axis == 2
    assert cut(layout, 2, windows=[None]).axis == 1, "all the same"


def test_a_picture_that_is_too_small_is_an_error_or_leaves_ranks_idle():
    layout = Layout(16, 12)
    with pytest.raises(
        ValueError, match=r"16 x 12 tokens has 2 bands of 8 lines .*too few for 3 ranks.*too_small='fewer'"
    ):
        cut(layout, 3)
    bands = cut(layout, 3, too_small="fewer")
    assert (bands.edges, bands.busy) == ((0, 8, 16, 16), 2)
    part = part_of(layout, Disc(3), bands, 2)
    assert (len(part.own), len(part.halo), part.sends) == (0, 0, {})
    assert key_tokens(part).tolist() == [-1] * layout.text_len


@pytest.mark.parametrize("shares", [(1,), (1, 0), (1, -1), (1, float("inf")), (True, 1), ("a", 1)])
def test_shares_that_make_no_sense_are_refused(shares):
    with pytest.raises(ValueError, match="one positive number for each of 2 ranks"):
        cut(Layout(32, 32), 2, shares)


def test_a_ranks_block_mask_of_the_whole_picture_is_the_mask_without_text_rows():
    layout = Layout(16, 16, 16, text_first=False)
    plan = build_band_plan(layout, Disc(3), Bands(1, (0, 16)), 0, "flex", Kernel((128, 64)), CPU)
    whole = block_mask(layout, Disc(3), block_size=(128, 64))
    assert torch.equal(plan.mask.kv_num_blocks[0, 0], whole.kv_num_blocks[0, 0, :2])
    assert torch.equal(plan.order, layout.permutation())


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.data())
def test_every_band_of_z_image_has_room_for_the_pads_of_the_whole_picture(height, width, ranks, data):
    bands = cut(Layout(height, width), ranks, too_small="fewer")
    own = part_of_size(Layout(height, width), bands, data.draw(st.integers(0, ranks - 1)))
    pads = -height * width % 32
    positions = (1, height + data.draw(st.integers(0, 9)), width + data.draw(st.integers(0, 9)))
    rows, columns = room_for(own, pads, positions)
    assert rows <= positions[1]
    assert columns <= positions[2]
    padded = -(-rows * columns // 32) * 32
    assert rows * columns >= own
    assert padded >= own + pads
    assert not pads or padded > rows * columns, "a pad to copy"
