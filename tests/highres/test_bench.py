"""bench/quality/highres.py: rows that are kept, drawn once, and measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("skimage")

sys.path.append(str(Path(__file__).parent.parent.parent))
from bench.quality import enlarged, highres


def invoke(tmp_path, *more):
    app = typer.Typer()
    app.command()(highres.main)
    options = ["--pictures", "1", "--shown", "1", "--steps", "1", "--native", "128", "--sizes", "256"]
    folder = ["--folder", str(tmp_path / "kept"), "--out", str(tmp_path / "out")]
    return CliRunner().invoke(app, [*options, "--weights", "own", *folder, *more])


def test_a_row_is_drawn_once_and_says_what_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("flexclear.compile.flex._why_not_compiled_on_cpu", lambda: "none are compiled for this test")
    asked = []
    enlarge = enlarged.upscale_cascade
    monkeypatch.setattr(
        enlarged, "upscale_cascade", lambda *a, **given: asked.append(given) or enlarge(*a, **{**given, "steps": 2})
    )
    rows = ("--row", "SDEdit: strength 0.5", "--row", "I-Max, dense", "--row", "CLEAR")
    done = invoke(tmp_path, *rows)
    assert done.exit_code == 0, done.output
    assert [(one["method"], one.get("strength"), one["native"]) for one in asked] == [
        ("sdedit", 0.5, 128), ("imax", None, 128)
    ]  # fmt: skip
    again = invoke(tmp_path, *rows)
    assert again.exit_code == 0, again.output
    assert len(asked) == 2, "they were kept"
    assert not (tmp_path / "out").exists()
    for name in ("sdedit-strength-0-5", "i-max-dense", "clear"):
        (found,) = json.loads((tmp_path / "kept" / f"{name}.json").read_text())
        assert found["pixels"] == 256
        assert 5 < found["psnr"] < 60
        assert load_file(tmp_path / "kept" / f"{name}-256.safetensors")["pictures"].shape == (1, 3, 256, 256)
    other = invoke(tmp_path, *rows, "--seed", "2")
    assert isinstance(other.exception, ValueError)
    assert "was begun with other settings (requests" in str(other.exception)
    monkeypatch.setattr(enlarged, "students_fingerprint", lambda: "others")
    assert "students: " in str(invoke(tmp_path, *rows).exception), "what other weights drew is not theirs"


def test_what_cannot_be_drawn_is_named(tmp_path):
    assert "unknown NTK; known are dense; CLEAR" in " ".join(
        invoke(tmp_path, "--row", "NTK").output.replace("│", "").split()
    )
    assert "--ablation: unknown SDEdit; known are all; SDEdit: strength 0.5" in " ".join(
        invoke(tmp_path, "--ablation", "SDEdit").output.replace("│", "").split()
    )
    assert "--native must be one of" in invoke(tmp_path, "--native", "512").output
