"""Video models on paper: what is counted in diffusers' forward passes against counts by hand, and predictions by the rates."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel

sys.path.append(str(Path(__file__).parents[1]))
from flexclear.masks import Layout, cylinder
from flexclear.rates.rates import PUBLISHED, Rates

from bench.on_paper import videos
from bench.on_paper.videos import HUNYUAN, META, WAN, Flops, count_flops, study, table

RATES = Rates("made up", dense=2e12, full=1e12, partial=1e12, linear=4e12)


def loops(partial, full, name, head_dim=128):
    kernel = {"loops": [{"instructions": partial}, {"instructions": full}]}
    case = {"head_dim": head_dim, "backward": False}
    return {"section": "clips", "name": name, "capability": [9, 0], "case": case, "kernels": [kernel]}


KERNELS = [
    loops(800, 400, "disc"),
    loops(1, 1, "disc", head_dim=64),
    loops(1200, 500, "clip, cylinder, lengths that do not divide"),
    loops(1600, 600, "clip, radial, lengths that do not divide"),
]


def test_wans_dense_pass_is_what_a_hand_counts():
    """Per layer: four projections, two of the attention to text on either side, and the MLP; then patches, text and head."""
    tokens, width, mlp, text = 21 * 45 * 80, 5120, 13824, 512
    found = count_flops(WAN)
    assert found.windowed == 40 * 4 * width * tokens**2
    assert found.other_attention == 40 * 4 * width * tokens * text
    layer = 2 * tokens * (4 * width**2 + 2 * width**2 + 2 * width * mlp) + 2 * text * 2 * width**2
    outside = 2 * tokens * width * (64 + 64) + 2 * text * (4096 * width + width**2)
    once = 2 * (256 * width + width**2 + 6 * width**2)
    assert found.linear == 40 * layer + outside + once
    assert found.share == pytest.approx(0.72, abs=0.01)


def test_hunyuans_dense_pass_is_what_a_hand_counts_to_a_thousandth():
    tokens, text, width = 33 * 45 * 80, 256, 3072
    found = count_flops(HUNYUAN)
    assert found.windowed == 60 * 4 * width * (tokens + text) ** 2
    assert found.linear == pytest.approx(60 * 2 * 12 * width**2 * (tokens + text), rel=2e-3)
    assert found.share == pytest.approx(0.87, abs=0.01)


def test_a_model_whose_layers_are_not_those_that_are_named_is_no_model():
    def build(layout):
        _, call = WAN.build(layout)
        with META:
            return WanTransformer3DModel(num_attention_heads=2, num_layers=2, ffn_dim=64), call

    small = dataclasses.replace(WAN, layout=Layout(2, 2, 0, frames=2), heads=2, build=build)
    assert count_flops(dataclasses.replace(small, layers=2)).windowed == 2 * 4 * 256 * 8**2
    with pytest.raises(RuntimeError, match="2 layers attend over 8 tokens, not 3"):
        count_flops(dataclasses.replace(small, layers=3))


@pytest.mark.parametrize("video", [WAN, HUNYUAN], ids=lambda video: video.name)
def test_attention_is_most_of_a_dense_pass_by_the_published_rates(video, monkeypatch):
    monkeypatch.setattr(videos, "WINDOWS", {})
    (dense,) = study(video, PUBLISHED[128], KERNELS)
    assert 0.65 < dense["attention_s"] / dense["pass_s"] < 0.9


def test_a_pass_is_attention_by_its_blocks_and_the_rest(monkeypatch):
    small = dataclasses.replace(WAN, layout=Layout(8, 12, 0, frames=5))
    monkeypatch.setattr(videos, "WINDOWS", {"cylinder(3, 1)": cylinder(3, 1)})
    monkeypatch.setattr(videos, "count_flops", lambda video: Flops(int(4e12), int(2e12), int(8e12)))
    dense, row = study(small, RATES, KERNELS)
    assert (dense["attention_s"], dense["rest_s"]) == (2.0, 3.0)
    blocks = 4 * 5120 * 64 * 64 / 1e12
    assert row["attention_s"] == pytest.approx(40 * blocks * (row["full"] + row["partial"]))
    assert row["cautious_pass_s"] == pytest.approx(3 + 40 * blocks * (row["full"] * 5 / 4 + row["partial"] * 3 / 2))
    assert row["gain"] == pytest.approx(5 / row["pass_s"])
    assert 480 * 4 < row["bytes"] < 5e6
    rows = [dense, row]
    text = table([*rows, {**dense, "model": HUNYUAN.name}], RATES)
    assert "COMPUTED, NOT MEASURED" in text
    assert "| cylinder(3, 1) |" in text
    assert "arXiv" in text
    assert "Theirs, not measured here" in text
