"""What flexclear is compared with: orders, masks and counts of others are what they are said to be."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from flexclear.masks import Disc, Layout, Neighborhood, dense_mask

sys.path.append(str(Path(__file__).parent.parent))
from bench.peers import run as peers
from bench.peers.gathered import Gathered
from bench.peers.orders import by_bits, by_division, disc_mod, morton_order, natten_mod
from bench.peers.ways import Way, all_ways, natten
from bench.pipeline import predicted, scaling

LAYOUT = Layout(16, 16, 128, order="raster")
RESULTS = Path(__file__).parents[1] / "bench" / "results"


def asked(mod, layout):
    """A ``mask_mod`` about every pair."""
    place = torch.arange(layout.seq_len)
    return mod(None, None, place[:, None], place[None, :])


def whole(order, text_len=128):
    return torch.cat([torch.arange(text_len), text_len + order])


def test_the_morton_curve_interleaves_bits():
    expected = []
    for place in range(256):
        bits = f"{place:08b}"
        expected.append(int(bits[0::2], 2) * 16 + int(bits[1::2], 2))
    assert morton_order(16).tolist() == expected
    assert sorted(expected) == list(range(256))
    with pytest.raises(ValueError, match="side is a power of two, got 48"):
        morton_order(48)


@pytest.mark.parametrize("r", [3, 8])
def test_their_masks_allow_the_pairs_of_the_windows_that_they_are_compared_with(r):
    order = whole(morton_order(16))
    disc = dense_mask(LAYOUT, Disc(r))
    assert torch.equal(asked(disc_mod(by_division(16), 128, r), LAYOUT), disc)
    assert torch.equal(asked(disc_mod(by_bits, 128, r), LAYOUT), disc[order][:, order])
    square = dense_mask(LAYOUT, Neighborhood(2 * r - 1))
    mod = natten_mod(by_bits, 128, 16, 16, 2 * r - 1)
    assert torch.equal(asked(mod, LAYOUT), square[order][:, order])


def test_gathering_gives_masked_attention():
    torch.manual_seed(0)
    tensors = torch.randn(3, 1, 2, LAYOUT.seq_len, 64).unbind()
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=dense_mask(LAYOUT, Disc(5)))
    found = Gathered(LAYOUT, 5, torch.device("cpu"))
    assert (found(*tensors) - expected).abs().max() < 1e-5
    # Strictly closer than 5: 69 offsets.
    assert found.keys == 69


def test_work_is_counted_as_create_block_mask_would_list_it():
    layout = Layout(32, 32, 128, order="raster")
    ways = {way.name: way for way in all_ways(layout, 4, None)}
    for name, mod in (
        ("released code: raster order", disc_mod(by_division(32), 128, 4)),
        ("attention-gym: Morton order, the same window", disc_mod(by_bits, 128, 4)),
        ("attention-gym: Morton order, natten mask 7 x 7", natten_mod(by_bits, 128, 32, 32, 7)),
    ):
        mask = create_block_mask(mod, None, None, layout.seq_len, layout.seq_len, device="cpu")
        listed = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
        assert ways[name].executed == listed * 128**2
        assert ways[name].useful == int(asked(mod, layout).sum())
    assert ways["masked SDPA"].executed == layout.seq_len**2


def few_ways(wrong):
    """Dense attention, and one that says that it has a window."""

    def ways(layout, r, tensors):
        run = lambda: F.scaled_dot_product_attention(*tensors)  # noqa: E731
        return [Way("dense", layout, None, 1, run), Way("another", layout, Disc(r) if wrong else None, 1, run)]

    return ways


def test_a_wrong_way_is_an_error_and_not_a_row(monkeypatch):
    monkeypatch.setattr(peers, "all_ways", few_ways(wrong=False))
    rows = peers.measure(16, 3, 1, 64, 16, 2, lambda what: None)
    assert [(row["way"], len(row["times_s"])) for row in rows] == [("dense", 2), ("another", 2)]
    monkeypatch.setattr(peers, "all_ways", few_ways(wrong=True))
    with pytest.raises(ArithmeticError, match="another at 16 x 16, r = 3, is wrong here"):
        peers.measure(16, 3, 1, 64, 16, 1, lambda what: None)


def test_slow_ways_have_fewer_rounds():
    assert [peers._rounds(times, 7) for times in ([], [0.1], [4.0], [20.0])] == [7, 7, 3, 1]


def test_what_is_not_there_says_so_in_its_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "natten", None)
    tensors = list(torch.randn(3, 1, 1, LAYOUT.seq_len, 64).unbind())
    way = natten(LAYOUT, 3, tensors)
    assert way.run is None
    assert "natten" in way.why_not
    row = {"way": way.name, "tokens": "", "r": 3, "ms": None, "why_not": way.why_not, "executed": 2, "useful": 1}
    assert f"| not run: {way.why_not} |" in peers.table([row]).replace("NATTEN 5 x 5, no text | ", "NATTEN | ")


def power(exponent, r, factor=1.0):
    return [
        {
            "side": side,
            "image_tokens": side**2,
            "tokens": side**2 + 512,
            "r": r,
            "step_s": factor * (side**2 + 512) ** exponent,
            "times_s": [1.0],
            "peak_bytes": side**2,
        }
        for side in (32, 64, 96, 128)
    ]


def test_exponents_and_crossings_of_known_curves_are_found():
    dense, windowed = power(2, None, 1 / 6000), power(1, 8)
    assert scaling.exponent(dense, "step_s") == pytest.approx(2)
    assert scaling.exponent(windowed, "step_s", scaling.LARGE) == pytest.approx(1)
    # Equal at 6000 tokens of which 512 are text; between sizes the curves are taken as straight.
    assert scaling.crossing(dense, windowed) == pytest.approx(6000 - 512, rel=0.03)
    assert scaling.crossing(power(2, None), windowed) == 0
    assert scaling.crossing(power(2, None, 1e-9), windowed) is None
    text = scaling.table([*dense, *windowed])
    assert re.search(r"\| r = 8 \| 1\.00 \| 1\.00 \| 1\.\d\d \| 5[45]\d\d image tokens", text)


@pytest.mark.parametrize(
    "name", [name for name in ("predicted", "peers", "scaling") if (RESULTS / f"{name}.json").is_file()]
)
def test_committed_results_and_their_tables_are_of_one_run(name):
    content = json.loads((RESULTS / f"{name}.json").read_text())
    text = (RESULTS / f"{name}.md").read_text()
    rows = content["rows"]
    if name == "predicted":
        assert predicted.table(rows, content["facts"]["rates"]) in text
        assert len(rows) == 6
        assert all(abs(row["off"]) <= predicted.BAR for row in rows)
    elif name == "peers":
        timed = [row for row in rows if "ms" in row]
        assert peers.table(timed) in text
        assert peers.table(timed) in (RESULTS.parents[1] / "docs" / "results.md").read_text()
        assert peers.work_table([row for row in rows if "ms" not in row]) in text
        assert {(row["side"], row["r"]) for row in timed} == {(64, 8), (64, 16), (128, 8), (128, 16)}
        assert all(row["error"] < 1e-2 for row in timed if row["error"] is not None)
    else:
        assert scaling.table(rows) in text
        assert {row["side"] for row in rows} == set(scaling.SIDES)
