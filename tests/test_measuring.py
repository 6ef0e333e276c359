"""``flexclear bench``: what it measures is checked, kept and predicted with; what cannot be measured is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flexclear import cli
from flexclear.compile import files, why_not_compiled
from flexclear.convert import transform
from flexclear.measuring import attention, peak, step, tuning
from flexclear.measuring import run as measuring
from flexclear.measuring.models import few_blocks, find_model
from flexclear.measuring.step import build, clocks
from flexclear.rates import kept

CPU = torch.device("cpu")
UNABLE = why_not_compiled(CPU)
able = pytest.mark.skipif(UNABLE is not None, reason=f"FlexAttention is not compiled here: {UNABLE}")

TINY = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": [8, 28, 28],
    "guidance_embeds": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's folder, of which only the configuration is there: no weights."""
    path = tmp_path_factory.mktemp("tiny")
    (path / "transformer").mkdir()
    (path / "transformer" / "config.json").write_text(json.dumps(TINY))
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXCLEAR_CACHE", str(tmp_path / "cache"))


def bench(folder, *options):
    arguments = ["bench", str(folder), "--device", "cpu", "--text-len", "16", "--repeats", "2", *options]
    return CliRunner().invoke(cli.app, arguments)


@able
def test_a_run_prints_draws_and_keeps_what_it_measured(folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    # Attention alone is compiled, as in a user's run; the model's would be another graph.
    monkeypatch.setattr(step, "transform", lambda model, r, backend: transform(model, r=r, backend="sdpa"))
    done = bench(
        folder, "--sizes", "256,320x256", "--r", "3", "--no-memory", "--json", "--png", str(tmp_path / "x.png")
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(row["px"], row["r"]) for row in found["rows"]] == [
        *(("256 x 256", None), ("256 x 256", 3)),
        *(("320 x 256", None), ("320 x 256", 3)),
    ]
    assert found["facts"]["blocks"] == "2 + 3"
    assert found["facts"]["blocks_run"] == "1 + 1"
    for row in found["rows"]:
        assert 0 < row["attention_error"] < 1e-2
        assert row["step_s"] > max(row["step_few_s"]) * 0.5
        assert set(row["block_s"]) == {"transformer_blocks", "single_transformer_blocks"}
        assert len(row["attention_times_ms"]) == len(row["step_few_s"]) == 2
        assert (row["step_error"] is None) == (row["r"] is None)
    with open(found["file"], encoding="utf-8") as file:
        assert json.load(file)["rows"] == found["rows"]
    rates = kept.rates_for(CPU, torch.bfloat16, 64)
    assert kept.as_json(rates) == found["rates"]
    assert str(found["file"]) in rates.source
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@able
def test_a_wrong_result_ends_the_run_and_nothing_is_kept(folder, monkeypatch):
    run = attention.windowed
    monkeypatch.setattr(attention, "windowed", lambda *args: lambda: run(*args)() * 1.1)
    done = bench(folder, "--sizes", "128", "--r", "3")
    assert isinstance(done.exception, ArithmeticError)
    assert "attention, r = 3, over 16 x 16 tokens is wrong here: relative error 1.0e-01 to float32" in str(
        done.exception
    )
    assert not kept.folder().exists()


@able
def test_kernels_that_fail_or_are_wrong_are_left_out(monkeypatch):
    layout = attention.Layout(16, 16, 16)
    tensors = attention.inputs(layout, 2, 64, CPU, torch.bfloat16)
    kernels = [tuning.Kernel(size) for size in ((128, 64), (64, 64), (32, 32))]
    run = tuning.windowed

    def windowed(layout, radius, kernel, tensors):
        if kernel is kernels[1]:
            raise RuntimeError("no resources\nand more")
        return (lambda: torch.zeros_like(tensors[0])) if kernel is kernels[2] else run(layout, radius, kernel, tensors)

    monkeypatch.setattr(tuning, "windowed", windowed)
    trials = tuning.try_kernels(kernels, {3: kernels[0]}, layout, tensors, 60)[3]
    assert [(trial.kernel, bool(trial.seconds)) for trial in trials] == [
        *((kernels[0], True), (kernels[1], False), (kernels[2], False))
    ]
    assert trials[1].why_not == "RuntimeError: no resources"
    assert trials[2].why_not == "ArithmeticError: attention, r = 3, is wrong here: relative error 1.0e+00 to float32"


def test_the_default_must_run(monkeypatch):
    monkeypatch.setattr(tuning, "windowed", lambda *args: 1 / 0)
    layout, kernel = attention.Layout(8, 8, 16), tuning.Kernel((64, 64))
    with pytest.raises(ZeroDivisionError):
        tuning.try_kernels([kernel], {3: kernel}, layout, attention.inputs(layout, 1, 64, CPU, torch.float32), 1)


def test_tuning_ends_in_time_and_what_one_radius_compiles_serves_the_others(monkeypatch):
    layout = attention.Layout(8, 8, 16)
    now, compiled = [0.0], set()

    def windowed(layout, radius, kernel, tensors):
        if kernel not in compiled:
            compiled.add(kernel)
            now[0] += 20
        speed = 0.1 if kernel.block_size == (64, 64) else 0.2

        def run():
            now[0] += speed

        return run

    monkeypatch.setattr(tuning, "windowed", windowed)
    monkeypatch.setattr(tuning, "relative_error", lambda *args: 0.0)
    monkeypatch.setattr(tuning, "timed", lambda run, device: -now[0] + (run(), now[0])[1])
    kernels = [tuning.Kernel((size, 64)) for size in (16, 32, 48, 64, 80, 96, 112)]
    tensors = attention.inputs(layout, 1, 64, CPU, torch.float32)
    found = tuning.try_kernels(kernels, {8: kernels[0], 16: kernels[1]}, layout, tensors, 180, clock=lambda: now[0])
    # Two defaults, and others until two thirds are over; 20.4 s each, 20.2 for the fast one.
    assert len(compiled) == 5
    assert now[0] <= 180
    assert [trial.kernel for trial in found[16]] == [kernels[1], kernels[0], *kernels[2:5]]
    rounds = len(found[8][0].seconds)
    assert rounds > 3
    lasting = {(radius, trial.kernel) for radius in found for trial in found[radius] if len(trial.seconds) == rounds}
    assert lasting == {(8, kernels[0]), (16, kernels[1]), (8, kernels[3]), (16, kernels[3])}


def test_memory_of_a_step_grows_with_the_image(folder):
    job = {"model": str(folder), "dtype": "float32", "text_len": 16, "blocks": 1, "compiled": False, "radius": None}
    small, large = peak.measure({**job, "grids": [(8, 8), (96, 96)]})
    # An MLP's hidden values alone: 9232 tokens of 512 channels.
    assert large - small > 9232 * 512 * 4


PEAK = """
import torch
from flexclear.measuring import peak

def run():
    for _ in range(20):
        torch.ones(1 << 20)

print(peak.peak_of(run))
"""


def test_a_peak_is_what_was_in_use_at_most():
    # In a process of its own, as it is measured: elsewhere earlier memory may be in use again. 4 MiB at a time, of 80 in all;
    # what else a process touches meanwhile is little.
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 2 << 20 < int(done.stdout) < 16 << 20


def test_few_blocks_are_those_of_each_kind_and_the_model_keeps_its_own(folder):
    model = find_model(str(folder), torch.bfloat16)
    few = few_blocks(model, 1)
    assert (len(few.transformer_blocks), len(few.single_transformer_blocks)) == (1, 1)
    assert model.counts == {"transformer_blocks": 2, "single_transformer_blocks": 3}
    assert all(parameter.device.type == "meta" for parameter in few.parameters())


def test_variants_share_their_weights_and_clocks_leave_nothing_behind(folder):
    variants = build(find_model(str(folder), torch.float32, 16), [3], CPU, blocks=1, compiled=False)
    pointers = [
        [parameter.data_ptr() for parameter in one.parameters()] for one in (variants.few, *variants.by_radius.values())
    ]
    assert pointers[0] == pointers[1] == pointers[2]
    block = variants.few.transformer_blocks[0]
    with clocks(variants.few, ["transformer_blocks"], CPU) as timing:
        assert len(timing["transformer_blocks"]) == 1
        assert block._forward_hooks
    assert not block._forward_hooks
    assert not block._forward_pre_hooks


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**TINY, "_class_name": "WanTransformer3DModel"}, "is a WanTransformer3DModel; flexclear bench supports"),
        ({"in_channels": 8}, "is not the configuration of a diffusers model: it has no _class_name"),
    ],
    ids=["class", "configuration"],
)
def test_a_model_that_is_not_known_is_named(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        find_model(str(tmp_path), torch.float32)
    with pytest.raises(FileNotFoundError, match="no file"):
        find_model(str(tmp_path / "nowhere"), torch.float32)


@able
def test_a_folder_that_nothing_can_be_kept_in_is_refused_before_anything_is_measured(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLEXCLEAR_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(measuring, "measure", lambda *args: 1 / 0)
    done = bench(folder, "--sizes", "128", "--r", "3")
    assert isinstance(done.exception, OSError)
    assert "results cannot be kept (Not a directory); set $FLEXCLEAR_CACHE to another folder" in str(done.exception)


def test_a_user_without_a_home_has_a_folder_and_runs(monkeypatch):
    for name in ("FLEXCLEAR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert files.user_folder().parent == Path(tempfile.gettempdir())
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert files.user_folder() == Path("/somewhere/flexclear")


@able
def test_sizes_that_a_model_has_no_positions_for_are_refused(folder):
    job = {"radii": (8,), "device": CPU, "dtype": torch.bfloat16}
    with pytest.raises(ValueError, match=r"sd3\.5-large has positions for 3072 pixels, got 4096"):
        measuring.Job("sd3.5-large", ((4096, 4096),), **job).check()
    with pytest.raises(ValueError, match=r"a token of .* covers 16 pixels a side; got a size of 8 x 64"):
        measuring.Job(str(folder), ((8, 64),), **job).check()
