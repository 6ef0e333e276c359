"""The GPU's model benchmark and the host's: what they refuse, and what rows they write, on a small model and a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import flexclear

sys.path.append(str(Path(__file__).parents[1]))
from bench.attention import host
from bench.gpu import model


def invoke(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(part) for part in arguments])


@pytest.fixture
def eager(monkeypatch):
    """Nothing is compiled: neither beforehand, in processes of their own, nor by ``optimize``."""
    monkeypatch.setattr(model, "prepare_all", lambda ways, tiny, seconds: {})
    monkeypatch.setattr(flexclear, "optimize", lambda built, **settings: built)


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("ways", "largest", "expected"),
    [
        (["dense"], 256, [("dense", 128, False), ("dense", 256, True)]),
        (["r = 16"], 128, [("r = 16", 128, False)]),
    ],
)
def test_only_the_chosen_ways_and_sizes_are_measured(eager, tmp_path, ways, largest, expected):
    chosen = [part for way in ways for part in ("--way", way)]
    done = invoke(model.main, tmp_path / "rows.jsonl", "--tiny", "--largest", largest, *chosen)
    assert done.exit_code == 0, done.output
    measured = [row for row in rows_of(tmp_path / "rows.jsonl") if "px" in row]
    assert [(row["way"], row["px"], "estimated" in row) for row in measured] == expected
    assert all(row["ms"] > 0 and "failed" not in row for row in measured)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--way", "r = 12"], "--way: unknown r = 12; known are r = 16, r = 16, FP8, dense"),
        (["--largest", 100], "--largest must be at least 128 pixels, got 100"),
    ],
)
def test_the_model_benchmark_refuses_what_it_could_not_measure(tmp_path, arguments, said):
    done = invoke(model.main, tmp_path / "rows.jsonl", "--tiny", *arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_host_benchmark_refuses_a_checkout_without_an_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "in_checkout", None)
    done = invoke(host.main, "--against", tmp_path, "--repeats", 1)
    assert done.exit_code == 2
    said = "".join(done.output.replace("│", " ").split())
    assert "".join(f"there is no {tmp_path}/.venv/bin/python".split()) in said


def test_the_host_benchmark_knows_where_a_window_adds_time(monkeypatch):
    """The small model of two blocks of each kind instead of FLUX.1's 57, so that it compiles in seconds."""
    monkeypatch.setattr(host, "LAYERS", (2, 2))
    monkeypatch.setattr(host, "ROUNDS", 3)
    found = host.measure("sdpa")
    assert set(found) == {"plain", "added"}
    assert found["plain"] > 0
    compiled = host.measure("compiled")
    assert set(compiled) == {"plain", "added", *host.PARTS}
