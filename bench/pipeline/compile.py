# ruff: noqa: E402  (the clock starts before the imports)
"""What compiling costs: seconds to the first picture cold and warm, and the price of graphs that serve all sizes.

    python -m bench.pipeline.compile --model embedded
    python -m bench.pipeline.compile --model flux-reduced --sizes 512 --sizes 768 --sizes 1024

Every start is a process of its own with an empty cache folder: cold; warm, from the file that the cold one saved; and
cold with dynamic shapes. Each draws all sizes in turn. Results go to bench/results/compile-<model>-<cpu|cuda>.{json,md}.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

BEGUN = time.perf_counter()  # imports count

import torch
import typer
from rich.console import Console

import flexclear
from flexclear.optimization import artifact_configuration

from bench.machine import RESULTS, facts, write_results
from bench.pipeline.models import MODELS, Job, build

STARTS = {
    "cold": {"dynamic": False, "warm": False},
    "warm": {"dynamic": False, "warm": True},
    "cold, dynamic": {"dynamic": True, "warm": False},
}
"""Kinds of start, in the order in which they are measured."""


def painter(model: str, device: torch.device, steps: int) -> tuple[Any, Callable[[int], float]]:
    """The pipeline or bare transformer to optimise, and a function from a side in pixels to the seconds of a picture."""
    dtype = torch.bfloat16
    if model == "embedded":
        pipe = flexclear.embedded.pipeline(dtype, device)
        pipe.set_progress_bar_config(disable=True)
        target = pipe

        def draw(side: int) -> None:
            pipe("a red apple on a blue background", height=side, width=side, num_inference_steps=steps)

    else:
        target = build(MODELS[model], device, dtype)

        def draw(side: int) -> None:
            job = Job(MODELS[model], target, side, side, steps, device, dtype)
            for number in range(steps):
                job.step(target, number)

    @torch.no_grad()
    def timed(side: int) -> float:
        begun = time.perf_counter()
        draw(side)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    return target, timed


def start(model: str, r: int, sizes: list[int], steps: int, repeats: int, dynamic: bool, file: Path, warm: bool) -> Any:
    """What one process measures; ``warm``: it loads ``file``, otherwise it writes it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target, timed = painter(model, device, steps)
    flexclear.transform(target, r=r)
    flexclear.optimize(target, dynamic=dynamic, warm_start=file if warm else None, progress=False)
    loaded = time.perf_counter() - BEGUN
    pictures = []
    for side in sizes:
        before = flexclear.compile.report()
        first = timed(side)
        new = flexclear.compile.report().since(before)
        later = [timed(side) for _ in range(repeats)]
        pictures.append(
            {
                "px": side,
                "first_s": first,
                "again_s": statistics.median(later),
                "later_s": later,
                "graphs": len(new.graphs),
            }
        )
        late = flexclear.compile.report().since(before).graphs[len(new.graphs) :]
        if late:
            raise RuntimeError(f"a picture of a size that was drawn before compiled again, at {side} px: {late}")
    if not warm:
        transformer = getattr(target, "transformer", target)
        flexclear.compile.save_artifacts(file, artifact_configuration(transformer, None, "default", dynamic))
    return {"ready_s": loaded, "first_picture_s": loaded + pictures[0]["first_s"], "pictures": pictures}


def table(rows: list[dict[str, Any]]) -> str:
    """Two tables: the starts, and what each size costs."""
    lines = [
        "| start | seconds to the first picture | of these, until the model is ready | graphs, all sizes |",
        "|---|---|---|---|",
    ]
    for row in rows:
        graphs = sum(picture["graphs"] for picture in row["pictures"])
        lines.append(f"| {row['start']} | {row['first_picture_s']:.1f} | {row['ready_s']:.1f} | {graphs} |")
    cold = next(row for row in rows if row["start"] == "cold")
    lines += ["", "| px | start | first picture, s | graphs | again, s | again vs cold |", "|---|---|---|---|---|---|"]
    for number, base in enumerate(cold["pictures"]):
        for row in rows:
            made = row["pictures"][number]
            lines.append(
                f"| {made['px']} | {row['start']} | {made['first_s']:.1f} | {made['graphs']} | {made['again_s']:.3f} "
                f"| {made['again_s'] / base['again_s']:.2f} x |"
            )
    return "\n".join(lines) + "\n"


def main(
    model: Annotated[str, typer.Option(help="embedded (the whole pipeline), or a transformer of pipeline.py.")],
    sizes: Annotated[list[int] | None, typer.Option(min=1, help="Sides in pixels; repeat.")] = None,
    r: Annotated[int, typer.Option(min=1, help="Window radius in tokens.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a picture.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Pictures of each size after the first; the median counts.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
    file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure cold, warm and dynamic starts, each in a fresh process with an empty cache."""
    if model not in MODELS:
        raise typer.BadParameter(f"--model must be one of {list(MODELS)}, got {model!r}")
    sides = sizes or ([128, 192, 256] if model == "embedded" else list(MODELS[model].sizes))
    if child is not None and file is not None:
        kind = STARTS[child]
        print(json.dumps(start(model, r, sides, steps, repeats, kind["dynamic"], file, kind["warm"])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status("") as status:
        for number, name in enumerate(STARTS):
            status.update(f"{name} start")
            saved = Path(folder) / f"artifacts-{STARTS[name]['dynamic']}.zip"
            command = [
                sys.executable,
                "-m",
                "bench.pipeline.compile",
                f"--model={model}",
                f"--r={r}",
                f"--steps={steps}",
            ]
            command += ["--repeats", str(repeats), "--child", name, "--file", str(saved)]
            command += [part for side in sides for part in ("--sizes", str(side))]
            cache = {
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor{number}",
                "TRITON_CACHE_DIR": f"{folder}/triton{number}",
            }
            done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the {name} start failed: {done.stderr.strip()[-2000:]}")
            rows.append({"start": name, **json.loads(done.stdout.splitlines()[-1])})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = facts(device, model=model, r=r, dtype="bfloat16", steps=steps, median_of=repeats)
    text = table(rows)
    write_results(f"compile-{model}-{device.type}", about, rows, text, out)
    print(text)


if __name__ == "__main__":
    typer.run(main)
