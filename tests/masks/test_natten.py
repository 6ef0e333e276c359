"""Neighborhoods mean what NATTEN means: its own kernels' answers, as ``bench/peers/natten_masks.py`` has written them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flexclear.masks import Layout, Neighborhood, cost, dense_mask
from flexclear.testing import assert_matches_dense

CASES = json.loads((Path(__file__).parent / "natten.json").read_text())


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['shape']}-{case['kernel']}-{case['stride']}-{case['dilation']}"
)
def test_the_window_is_nattens(case):
    shape = case["shape"]
    layout = Layout(*shape[-2:], text_len=0, order="raster", frames=1 if len(shape) == 2 else shape[0])
    window = Neighborhood(tuple(case["kernel"]), tuple(case["stride"]), tuple(case["dilation"]))
    expected = torch.tensor([[int(row, 16) >> key & 1 for key in range(layout.seq_len)] for row in case["rows"]]).bool()
    assert torch.equal(dense_mask(layout, window), expected)
    assert cost(layout, window).pairs == int(expected.sum())
    assert_matches_dense(layout, window, block_size=16, attention=False, around=False, reference=expected)


def test_cases_have_strides_dilation_and_sides_that_neither_divides():
    assert {len(case["shape"]) for case in CASES} == {2, 3}
    for name in ("stride", "dilation"):
        uneven = [
            case for case in CASES if any(n > 1 and side % n for n, side in zip(case[name], case["shape"], strict=True))
        ]
        assert {len(case["shape"]) for case in uneven} == {2, 3}
