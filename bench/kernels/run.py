"""The kernels of CUDA GPUs, compiled on a machine that needs none: registers, spills, shared memory, length of their loops.

    python -m bench.kernels.run                                        # all; resumes where it was stopped
    python -m bench.kernels.run --section interpreter --capability 9.0 --again
    python -m bench.kernels.run --limit 600                            # seconds

Inductor generates them from fake tensors on ``cuda:0``, Triton and ptxas compile them, and Triton's interpreter runs those of
small layouts in float32 against masked SDPA. Writes ``bench/results/kernels.{json,md}`` after every case. Fails if a kernel is
refused, wants more shared memory than its GPU has, or spills where none may; or if a result is wrong.

What has been measured is kept if torch, Triton, the masks and what flexclear chooses for the case are what they were, or the
generated sources are.
"""

from __future__ import annotations

import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import typer
from rich.console import Console

from bench.kernels.cases import jobs
from bench.kernels.report import faults, key_of, read_rows, row_of, write
from bench.machine import RESULTS
from fakegpu import device, worker

console = Console(stderr=True)


def main(
    section: Annotated[
        list[str] | None, typer.Option(help="attention, every, options, clips or interpreter; repeatable")
    ] = None,
    capability: Annotated[list[str] | None, typer.Option(help="such as 9.0; repeatable")] = None,
    mask: Annotated[list[str] | None, typer.Option(help="name of a mask, options or layout; repeatable")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float16 or float32; repeatable")] = None,
    again: Annotated[bool, typer.Option(help="measure anew what is known")] = False,
    limit: Annotated[float | None, typer.Option(help="seconds after which no case is begun")] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Compile and interpret, and write tables."""
    reason = device.why_not()
    if reason is not None:
        console.print(reason)
        raise typer.Exit(1)
    wanted = [
        job
        for job in jobs()
        if (not section or job.section in section)
        and (not capability or "{}.{}".format(*job.capability) in capability)
        and (not mask or job.name in mask)
        and (not dtype or job.case.dtype in dtype)
    ]
    if not wanted:
        raise typer.BadParameter("no case is of that section, capability, mask and dtype")
    rows, start = read_rows(out), time.perf_counter()
    for (kind, gpu, _), group in groupby(wanted, key=lambda job: (job.how, job.capability, job.section)):
        left = list(group)
        known = [None if again else rows.get(key_of(job)) for job in left]
        results = worker.run(gpu, [job.case for job in left], kind, known)
        for number, (job, result) in enumerate(zip(left, results, strict=True)):
            if result["status"] == "known":
                rows[key_of(job)].update((name, result[name]) for name in ("fingerprint", "sources") if name in result)
            else:
                rows[key_of(job)] = row_of(job, result)
                write(rows, out)
                console.print(f"{job.section}, sm_{gpu[0]}{gpu[1]}, {job.name}, {_short(result)}", highlight=False)
            if limit is not None and time.perf_counter() - start > limit and number + 1 < len(left):
                results.close()
                console.print("stopped at the limit; what is measured is written")
                raise typer.Exit(2)
    write(rows, out)
    found = faults(rows.values())
    for fault in found:
        console.print(fault, highlight=False)
    raise typer.Exit(1 if found else 0)


def _short(result: dict[str, Any]) -> str:
    case = result["case"]
    what = f"head dim {case['head_dim']}, {case['dtype']}, {'training' if case['backward'] else 'inference'}"
    return f"{what}: {result['status']}, {result['seconds']} s"


if __name__ == "__main__":
    typer.run(main)
