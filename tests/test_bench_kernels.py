"""The command that compiles kernels without a GPU: what it calls a fault, and that it resumes where it was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fakegpu.cases import Case

sys.path.append(str(Path(__file__).parent.parent))
from bench.kernels import report as kernels_report
from bench.kernels import run as bench
from bench.kernels.cases import INTERPRETED_FOR, LAYOUTS, jobs

ERRORS = dict.fromkeys(("output", "lse", "query", "key", "value"), 1e-6)


def kernel(**changes):
    facts = {"kind": "forward", "registers": 200, "spill_stores": 0, "spill_loads": 0, "shared": 60_000, "warps": 8}
    facts |= {
        "stages": 2,
        "constants": {"BLOCK_M": 128, "BLOCK_N": 64, "SPARSE_Q_BLOCK_SIZE": 128},
        "wgmma": 8,
        "tma": 0,
    }
    facts["constants"]["SPARSE_KV_BLOCK_SIZE"] = 64
    loops = [{"instructions": 900, "products": 8}, {"instructions": 500, "products": 8}]
    return {**facts, "loops": loops, **changes}


def row(capability=(8, 9), kernels=(), section="attention", **case):
    facts = {"section": section, "name": "disc", "status": "ok", "capability": list(capability)}
    return {**facts, "case": Case(**case).to_json(), "kernels": list(kernels)}


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (
            row(kernels=[kernel(spill_stores=4)]),
            "sm_89, head dim 128, bfloat16, disc, forward: spills 4 bytes, loads 0",
        ),
        (row(kernels=[kernel(kind="lse", spill_loads=8)]), "forward with LSE: spills 0 bytes, loads 8"),
        (
            row(kernels=[kernel(kind="backward", shared=101_377)]),
            "backward: 101377 bytes of shared memory, the GPU has 101376",
        ),
        ({**row(kernels=[kernel(spill_stores=4)], section="options"), "name": "IS_DIVISIBLE=False"}, "spills 4 bytes"),
        ({**row(), "status": "refused", "reason": "no tile"}, "disc: refused: no tile"),
        ({**row(section="interpreter"), "errors": {**ERRORS, "key": 2e-5}}, "disc: key is off by 2.0e-05"),
        ({**row(section="interpreter"), "errors": {**ERRORS, "lse": float("nan")}}, "disc: lse is off by nan"),
    ],
    ids=[
        "spills",
        "spills with log-sum-exp",
        "shared memory",
        "spills where lengths do not divide",
        "refused",
        "wrong",
        "not a number",
    ],
)
def test_what_may_not_be_is_a_fault_that_says_where(faulty, message):
    (fault,) = kernels_report.faults([faulty])
    assert message in fault


@pytest.mark.parametrize(
    "fine",
    [
        row(kernels=[kernel()]),
        row(kernels=[kernel(kind="backward", spill_stores=800)]),
        row(kernels=[kernel(spill_stores=8)], head_dim=256),
        row(kernels=[kernel(spill_stores=8)], dtype="float32"),
        row(kernels=[kernel(spill_stores=8)], capability=(8, 0)),
        row(kernels=[kernel(spill_stores=8)], section="options"),
        {**row(section="interpreter"), "errors": ERRORS},
    ],
    ids=["nothing", "backward", "long heads", "float32", "another GPU", "the caller's options", "right"],
)
def test_what_may_be_is_none(fine):
    assert kernels_report.faults([fine]) == []


def test_everything_that_is_asked_for_is_a_job_once():
    wanted = list(jobs())
    assert len({(job.section, job.capability, str(job.case)) for job in wanted}) == len(wanted)
    every = {
        (job.capability, job.case.head_dim, job.case.dtype, job.case.backward)
        for job in wanted
        if job.name == "disc" and job.case.head_dim <= 128 and job.case.dtype in ("bfloat16", "float32")
    }
    assert len(every) == 48
    assert {job.capability for job in wanted if job.how == "interpret"} == {INTERPRETED_FOR}
    assert len(LAYOUTS) >= 6


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command, with results in place of the process that makes them; returns its exit status and what it was asked."""
    asked = []

    def results(capability, cases, how, known):
        for case, earlier in zip(cases, known, strict=True):
            mark = None if earlier is None else earlier["fingerprint"]
            asked.append(mark)
            facts = {"case": case.to_json(), "capability": list(capability), "fingerprint": "f", "seconds": 0.1}
            done = {"status": "ok", "errors": ERRORS, "tokens": [9, 9], "unmasked": 1.0}
            yield {**facts, **({"status": "known"} if mark == "f" else done)}

    monkeypatch.setattr(bench.worker, "run", results)
    monkeypatch.setattr(bench.device, "why_not", lambda: None)

    def call(*options):
        app = typer.Typer()
        app.command()(bench.main)
        asked.clear()
        done = CliRunner().invoke(app, ["--section", "interpreter", "--out", str(tmp_path), *options])
        assert isinstance(done.exception, SystemExit | None), done.exception
        call.output = done.output
        return done.exit_code, list(asked)

    return call


def test_it_goes_on_where_it_was_stopped(run, tmp_path):
    layouts = [job for job in jobs() if job.section == "interpreter"]
    assert run("--limit", "0") == (2, [None])
    assert run() == (0, ["f", *[None] * (len(layouts) - 1)])
    assert run() == (0, ["f"] * len(layouts))
    assert run("--again", "--mask", "no text") == (0, [None])
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert len(rows) == len(layouts)
    assert all(name in (tmp_path / "kernels.md").read_text() for name in LAYOUTS)


def test_it_says_what_is_not_checked_where_nothing_can_be(run, monkeypatch):
    monkeypatch.setattr(bench.device, "why_not", lambda: "CUDA kernels are not compiled")
    assert run() == (1, [])
    assert "CUDA kernels are not compiled" in run.output


def test_a_case_that_there_is_not_is_refused(run):
    assert run("--mask", "nonsense") == (2, [])
    assert "no case is of that section" in run.output
