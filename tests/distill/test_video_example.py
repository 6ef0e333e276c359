"""The worked example of docs/distilling-videos.md runs as it is written, on a small pipeline, and shows what was measured."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import typer
from diffusers import WanPipeline
from typer.testing import CliRunner

from flexclear.runtime.hooks import entry_hook_of

from helpers.models_video import tiny_wan
from helpers.pipelines_video import TEXT, wan_parts

sys.path.append(str(Path(__file__).parents[2]))
from bench.distillation import video

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distilling-videos.md").read_text(encoding="utf-8")
SMALLER = {
    "r=16": "r=2",
    "frame_radius=4": "frame_radius=1",
    "steps=2000": "steps=2, device='cpu', backend='sdpa'",
    'mixed_precision="bf16"': 'mixed_precision="no"',
    "max_sequence_length=512": "max_sequence_length=16",
    'train="lora"': 'train="lora", optimizer=OptimizerConfig("adamw", learning_rate=1e-2)',
}
"""What the page asks for, and what the test does in its place."""


@pytest.fixture
def pipe():
    made = WanPipeline(**wan_parts(tiny_wan(text_dim=TEXT)))
    made.set_progress_bar_config(disable=True)
    return made


def test_the_page_s_code_encodes_trains_and_loads(pipe, tmp_path, monkeypatch):
    from flexclear.distill import OptimizerConfig

    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(code) == 3
    encoding, training, use = code
    for given, smaller in SMALLER.items():
        assert given in PAGE
        encoding, training, use = (part.replace(given, smaller) for part in (encoding, training, use))
    clips = [(torch.rand(3, 9, 64, 96) * 2 - 1, caption) for caption in ("an apple", "a cat that runs")]
    names = {"pipe": pipe, "clips": clips, "OptimizerConfig": OptimizerConfig}
    exec(encoding, names)
    sample = names["samples"][0]
    assert sample.mean.shape == (4, 3, 8, 12)
    assert names["samples"].shift_factor == tuple(pipe.vae.config.latents_mean)
    exec(training, names)
    assert names["done"].weights == Path("runs/wan_r16_t4/weights.safetensors")
    trained = attention_weights(pipe)
    fresh = {**names, "pipe": WanPipeline(**wan_parts(tiny_wan(text_dim=TEXT)))}
    exec(use, fresh)
    loaded, plain = (
        attention_weights(fresh["pipe"]),
        attention_weights(WanPipeline(**wan_parts(tiny_wan(text_dim=TEXT)))),
    )
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], right) for name, right in trained.items())
    assert any(not torch.equal(plain[name], right) for name, right in trained.items())
    assert entry_hook_of(fresh["pipe"].transformer).settings.windows == entry_hook_of(pipe.transformer).settings.windows


def attention_weights(pipe):
    """Weights of self-attention's projections, which a LoRA that is gone has left in wrappers."""
    named = pipe.transformer.named_parameters()
    return {name.replace(".base_layer", ""): p.detach().clone() for name, p in named if ".attn1.to_" in name}


def test_the_page_s_table_is_the_committed_result():
    committed = (ROOT / "bench" / "results" / "distillation-video.md").read_text(encoding="utf-8")
    facts, _, table = committed.partition("\n\n")
    assert table in PAGE
    assert f"Each window was distilled in {re.search(r'(?<!_)steps ([0-9]+)', facts)[1]} steps" in PAGE


@pytest.mark.kept
def test_the_benchmark_measures_every_window_before_and_after(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "WINDOWS", dict(list(video.WINDOWS.items())[:2]))
    monkeypatch.setattr(video, "EULER", 2)
    app = typer.Typer()
    app.command()(video.main)
    sizes = ("--teacher-steps", "2", "--steps", "1", "--training-clips", "8", "--unseen-clips", "2")
    done = CliRunner().invoke(app, [*sizes, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "distillation-video.json").read_text())["rows"]
    assert [(row["window"], row["trained"]) for row in rows] == [
        (name, kind)
        for name in video.WINDOWS
        for kind in (("projections", "lora") if name == video.FIRST else ("projections",))
    ]
    for row in rows:
        assert 0 < row["density"] < 1
        for before, after in (row["prediction"], row["clip"]):
            assert before > 0
            assert after != before
    assert (tmp_path / "distillation-video.md").read_text().endswith(video.table(rows))
