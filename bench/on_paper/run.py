"""Published models at full width and depth on a GPU that is not there: what synchronizes, compiles, multiplies, and memory.

    python -m bench.on_paper.run                                  # all, about an hour; resumes where it was stopped
    python -m bench.on_paper.run --model FLUX.1-dev --again

Weights and tokens are fake, masks and plans are real, Inductor's wrappers are generated and run with kernels that do nothing
(``tests/fakegpu``). Nothing is timed: memory is computed. Writes ``bench/results/on_paper.{json,md}`` after every job. Fails if
a call waits for the GPU but to read a new grid, a size that was seen before compiles anything, a LoRA that is exchanged does, a
size needs more than one graph for each kind of block, or a quantized linear multiplies otherwise than in FP8.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import typer
from rich.console import Console

from bench.machine import RESULTS
from bench.on_paper.report import faults, report
from fakegpu import device
from fakegpu.study import Job, rows

SIZES = (1024, 2048, 4096, 8192, 16384)
MODELS = {"FLUX.1-dev": SIZES, "SD3.5-large": (1024, 2048, 3072), "Qwen-Image": SIZES, "FLUX.2-dev": SIZES}
"""Models and pixels on a side; SD3.5's position embedding ends at 3072."""

console = Console(stderr=True)


def jobs() -> list[Job]:
    """What is studied: each model eager, compiled, and compiled in FP8 by rows (on the way from the CPU) and by tensors."""
    found = []
    for model, sizes in MODELS.items():
        found += [
            Job(model, sizes, "rowwise", from_cpu=True),
            Job(model, sizes, "bfloat16", lora=True),
            Job(model, sizes[:2], "tensorwise"),
            Job(model, sizes, "bfloat16", compiled=False),
        ]
    return found


def main(
    model: Annotated[list[str] | None, typer.Option(help="one of the models; repeatable")] = None,
    again: Annotated[bool, typer.Option(help="do anew what is known")] = False,
    limit: Annotated[float | None, typer.Option(help="seconds after which no job is begun")] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Study the models, and write tables."""
    reason = device.why_not()
    if reason is not None:
        console.print(reason)
        raise typer.Exit(1)
    unknown = set(model or ()) - set(MODELS)
    if unknown:
        raise typer.BadParameter(f"no model {sorted(unknown)}; there are {list(MODELS)}")
    path, start = out / "on_paper.json", time.perf_counter()
    known: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    for job in jobs():
        asked = json.loads(json.dumps(asdict(job)))
        there = any(row["job"] == asked for row in known)
        if (model and job.model not in model) or (there and not again):
            continue
        if limit is not None and time.perf_counter() - start > limit:
            console.print(f"stopped after {limit:g} s; the same command continues")
            break
        console.print(f"{job.model} in {job.precision}, {'compiled' if job.compiled else 'eager'}")
        try:
            done = list(rows(job))
        except RuntimeError as error:
            console.print(f"[red]{error}")
            done = [{"job": asked, "what": "failed", "reason": str(error)[-300:]}]
        known = [row for row in known if row["job"] != asked] + done
        _write(out, known)
    wrong = faults(known)
    for line in wrong:
        console.print(f"[red]{line}")
    raise typer.Exit(bool(wrong))


def _write(out: Path, known: list[dict[str, Any]]) -> None:
    import torch

    from flexclear.compile.files import whole_file

    versions = {"torch": torch.__version__.partition("+")[0], "GPU": "H100 (sm_90), not there"}
    for name, text in (
        ("on_paper.json", json.dumps({"versions": versions, "rows": known}, indent=1) + "\n"),
        ("on_paper.md", report(known, versions)),
    ):
        with whole_file(out / name) as file:
            file.write_text(text)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    typer.run(main)
