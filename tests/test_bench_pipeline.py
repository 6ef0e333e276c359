"""The benchmark of the whole job, on a tiny model: what it times is checked, and what cannot run says why."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler
from typer.testing import CliRunner

import flexclear

sys.path.append(str(Path(__file__).parent.parent))
from bench.pipeline import models as pipeline_models
from bench.pipeline import report as pipeline_report
from bench.pipeline import rows as pipeline_rows
from bench.pipeline import run as bench
from bench.pipeline import variants as pipeline_variants

CPU = torch.device("cpu")
FIELDS = {
    *("variant", "px", "side", "tokens", "r", "step_s", "timed_steps", "total_s", "extrapolated", "first_step_s"),
    *("compile_s", "graphs", "peak_bytes", "error", "unmasked", "why_not", "wrong", "speedup"),
}


def run(out, *options, model="tiny"):
    app = typer.Typer()
    app.command()(bench.main)
    fixed = ["--model", model, "--dtype", "float32", "--no-compile", "--backend", "sdpa", "--steps", "3"]
    done = CliRunner().invoke(app, bench.spread([*fixed, "--out", str(out), *options]))
    assert isinstance(done.exception, SystemExit | ValueError | None), done.exception
    file = out / f"pipeline-{model}-cpu.json"
    return done, json.loads(file.read_text())["rows"] if file.is_file() else []


@pytest.mark.kept
def test_every_variant_is_timed_and_checked_against_the_dense_mask(tmp_path):
    done, rows = run(tmp_path)
    assert done.exit_code == 0
    assert all(set(row) == FIELDS for row in rows)
    assert len(rows) == 2 * 2 + 3 * 2 * 2
    timed = [row for row in rows if row["variant"] != "flexclear FP8"]
    for row in timed:
        assert row["error"] <= 1e-5
        assert row["step_s"] > 0
        assert (row["timed_steps"], row["extrapolated"], row["why_not"], row["wrong"]) == (2, False, None, False)
        assert row["r"] is None or row["unmasked"] > 1e-2
    assert {row["r"] for row in timed} == {None, 3, 4}
    assert all(row["speedup"] == 1 for row in timed if row["variant"] == "dense")
    assert (tmp_path / "pipeline-tiny-cpu.png").stat().st_size > 1000


def test_a_variant_that_the_machine_cannot_run_says_why(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine may run FP8")
    _, rows = run(tmp_path, "--variant", "flexclear FP8", "--sizes", "192")
    assert [row["why_not"] for row in rows] == ["FP8 products need a CUDA device; this is 'cpu'"] * 2
    assert "not run: FP8 products need a CUDA device" in (tmp_path / "pipeline-tiny-cpu.md").read_text()


@pytest.mark.kept
def test_a_size_that_the_model_has_no_positions_for_says_so_and_the_others_go_on(tmp_path):
    done, rows = run(tmp_path, model="tiny-sd3")
    assert done.exit_code == 0
    for row in rows:
        if "FP8" not in row["variant"]:
            assert (row["error"] or 0) <= 1e-5
            assert (row["why_not"] is None) == (row["px"] == 192)
    assert any("pos_embed_max_size=14" in row["why_not"] for row in rows if row["px"] == 256)


def test_out_of_memory_in_one_variant_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    step = pipeline_models.Job.step

    def exhausted(self, transformer, number):
        if self.grid == (16, 16) and flexclear.runtime.hooks.entry_hook_of(transformer) is None:
            raise torch.OutOfMemoryError("Tried to allocate 9.00 GiB.\nGPU 0 has ...")
        step(self, transformer, number)

    monkeypatch.setattr(pipeline_models.Job, "step", exhausted)
    done, rows = run(tmp_path, "--variant", "dense", "--variant", "flexclear", "--radii", "3")
    assert done.exit_code == 0
    reasons = {(row["variant"], row["px"]): row["why_not"] for row in rows}
    assert reasons.pop(("dense", 256)) == "out of memory: Tried to allocate 9.00 GiB."
    assert set(reasons.values()) == {None}
    assert next(row for row in rows if row["variant"] == "flexclear" and row["px"] == 256)["speedup"] is None


def test_a_wrong_window_is_found(tmp_path, monkeypatch):
    prepare = pipeline_variants.prepare

    def wrong(transformer, variant, r, *others):
        prepare(transformer, variant, r and r + 1, *others)

    monkeypatch.setattr(pipeline_rows, "prepare", wrong)
    done, rows = run(tmp_path, "--variant", "flexclear", "--sizes", "192", "--radii", "3")
    assert done.exit_code == 1
    assert rows[0]["wrong"]
    assert "WRONG: flexclear, r = 3" in done.output


def test_a_budget_stops_the_timing_and_the_total_is_marked(tmp_path):
    _, rows = run(tmp_path, "--budget", "0", "--variant", "dense", "--sizes", "192", "--steps", "20")
    (row,) = rows
    assert (row["timed_steps"], row["extrapolated"]) == (1, True)
    assert row["total_s"] == pytest.approx(20 * row["step_s"])
    assert "| ~ " in (tmp_path / "pipeline-tiny-cpu.md").read_text()


def test_rows_of_an_earlier_run_are_kept_where_the_conditions_are_the_same(tmp_path):
    run(tmp_path, "--variant", "dense", "--sizes", "192")
    _, rows = run(tmp_path, "--variant", "flexclear", "--sizes", "192", "--radii", "3", "--append")
    assert [row["variant"] for row in rows] == ["dense", "flexclear"]
    assert rows[1]["speedup"] is not None
    with pytest.raises(ValueError, match="was measured with another steps"):
        bench.earlier(tmp_path / "pipeline-tiny-cpu.json", {"steps": 20})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--variant", "sparse"), "sparse"),
        (("--weights", "trained"), "only the embedded model comes with weights"),
        (("--dtype", "int4"), "int4"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, options, said):
    done, _ = run(tmp_path, *options)
    assert done.exit_code != 0
    assert said in f"{done.output}{done.exception}"


def test_options_take_several_numbers():
    assert bench.spread(["--sizes", "1024", "2048", "--r", "1", "2"]) == [
        *("--sizes", "1024", "--sizes", "2048", "--r", "1", "2")
    ]


def test_the_loop_is_the_pipeline_s(monkeypatch):
    pipe = flexclear.embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**pipeline_models.FLUX_SCHEDULER)
    model = dataclasses.replace(pipeline_models.MODELS["embedded"], text_len=16)
    with torch.no_grad():
        job = pipeline_models.Job(model, pipe.transformer, 64, 96, 3, CPU, torch.float32)
        text, pooled, _ = pipe.encode_prompt("a red apple", max_sequence_length=16)
        expected = pipe(
            prompt_embeds=text,
            pooled_prompt_embeds=pooled,
            height=64,
            width=96,
            num_inference_steps=3,
            latents=job.latents,
            output_type="latent",
        ).images
        job.kwargs |= {"encoder_hidden_states": text, "pooled_projections": pooled}
        for number in range(3):
            job.step(pipe.transformer, number)
    assert torch.equal(job.latents, expected)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("flux.1-dev", 11_901_408_320), ("flux.1-schnell", 11_891_178_560), ("sd3.5-large", 8.06e9)],
)
def test_the_models_have_their_published_sizes(name, parameters):
    transformer = pipeline_models.skeleton(pipeline_models.MODELS[name], torch.bfloat16)
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(
        parameters, rel=2e-3 if name[0] == "s" else 0
    )


def test_random_weights_leave_no_gate_at_zero():
    transformer = pipeline_models.build(pipeline_models.MODELS["tiny"], CPU, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() and p.any() for p in transformer.parameters())


def test_the_published_curve_is_the_paper_s():
    assert [round(speedup, 1) for _, speedup in pipeline_report.paper_speedups(8)] == [1.0, 1.3, 2.1, 6.3]
