"""Whole models on a GPU that is not there, tiny: what ``bench/on_paper/run.py`` finds at full size. Processes of their own."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from bench.on_paper.report import faults, report
from fakegpu import device
from fakegpu.study import Job, rows


@pytest.fixture(scope="module", autouse=True)
def _possible():
    """Skip where kernels cannot be generated, and say why; in continuous integration that is a failure."""
    reason = device.why_not()
    if reason is not None:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)


JOBS = {
    # Head dim 128, single blocks over text and image together, whose number is a sum with a symbol in it.
    "FLUX.1, FP8 by rows from the CPU": Job("FLUX.1-dev", (512,), "rowwise", from_cpu=True, tiny=True),
    "Qwen-Image, two sizes and a LoRA": Job("Qwen-Image", (256, 512), lora=True, tiny=True),
}


FLUX, QWEN = JOBS


@functools.cache
def found(name):
    """Rows of a job, made once."""
    return list(rows(JOBS[name]))


@pytest.mark.kept("FLUX*")
@pytest.mark.parametrize("name", JOBS)
def test_calls_wait_for_nothing_compile_once_and_fuse_everything(name):
    own = found(name)
    assert faults(own) == []
    calls = [row for row in own if "pixels" in row]
    assert [row["what"] for row in calls[:2]] == ["first", "second"]
    assert all(row["peak"] > row["live"] > 0 for row in calls)
    assert all(row["launches"] > 0 for row in calls)
    assert sum(row["graphs"] for row in calls) > 0


def test_every_quantized_linear_is_one_product_in_eight_bits():
    own = found(FLUX)
    loaded = next(row for row in own if row["what"] == "loaded")
    assert loaded["quantized"] == 34, "two double blocks of twelve, two single blocks of five"
    assert all(row["products"]["_scaled_mm"] == 34 for row in own if "pixels" in row)


@pytest.mark.kept("FLUX*")
@pytest.mark.parametrize("name", JOBS)
def test_the_report_has_the_job_and_says_that_it_is_computed(name):
    text = report(found(name), {"torch": "2"})
    assert "**Computed, not measured**" in text
    assert JOBS[name].model in text
    assert "## Faults\n\nNone." in text


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"graphs": 3, "causes": ["size mismatch"]}, "3 graphs, at most 2 are needed"),
        ({"readings": ["a", "b"]}, "reads values on the GPU"),
        ({"what": "second", "graphs": 1}, "1 graphs, at most 0"),
        ({"what": "second", "transfers": ["cpu->cuda"]}, "copies between CPU and GPU"),
        ({"products": {"mm": 34}}, "0 FP8 products for 34 quantized linears"),
    ],
)
def test_the_report_names_what_is_wrong(change, fault):
    job = {"model": "FLUX.1-dev", "precision": "rowwise", "compiled": True, "from_cpu": True}
    row = {"job": job, "what": "first", "pixels": 512, "graphs": 2, "causes": [], "readings": ["ids"], "transfers": []}
    row["products"] = {"_scaled_mm": 34}
    loaded = {"job": job, "what": "loaded", "quantized": 34, "weights": 50, "peak": 60, "largest": 2}
    assert "at a time" in faults([{**loaded, "peak": 70}])[0]
    assert faults([loaded, row]) == []
    assert [text for text in faults([loaded, {**row, **change}]) if fault in text]
