# ruff: noqa: E402  (the clock starts before the imports)
"""What compiling costs: seconds to the first image cold and warm, for a size not seen before, and what its graphs are worth.

    python -m bench.pipeline.compile --model embedded
    python -m bench.pipeline.compile --model flux-reduced --sizes 512 --sizes 768 --sizes 1024

A model with windows under ``flexclear.optimize``, and the plain one under diffusers' own ``compile_repeated_blocks``, each with
graphs for one size and for all. Every start is a process of its own, with an empty cache folder: cold; with the one that a cold
start has left: warm; or with an empty one and the file that a cold start has saved. Each draws all sizes in turn. Results go to
bench/results/compile-<model>-<cpu|cuda>.{json,md}.
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
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

BEGUN = time.perf_counter()  # imports count

import torch
import typer
from rich.console import Console

import flexclear
from flexclear.compile.report import remember_all_graphs
from flexclear.optimization import artifact_configuration

from bench.machine import RESULTS, facts, write_results
from bench.pipeline.models import MODELS, Job, build


@dataclass(frozen=True)
class Start:
    """How one process begins.

    Attributes:
        windows: flexclear's model; False: diffusers' own.
        dynamic: whether one set of graphs is for all sizes.
        cache: ``"cold"``; ``"warm"``: what the cold start like it has left is there; ``"file"``: its file alone.
    """

    windows: bool
    dynamic: bool
    cache: str

    def __str__(self) -> str:
        whose = "windows" if self.windows else "plain, `compile_repeated_blocks`"
        cache = {"cold": "cold", "warm": "warm", "file": "warm, from a file"}[self.cache]
        return f"{whose}, {'dynamic' if self.dynamic else 'static'}, {cache}"


STARTS = (
    *(
        Start(windows, dynamic, cache)
        for windows, dynamic in product((True, False), repeat=2)
        for cache in ("cold", "warm")
    ),
    Start(True, False, "file"),
)
"""The starts, in the order in which they are measured: what a cold one leaves is there for others."""


def painter(model: str, device: torch.device, steps: int) -> tuple[Any, Callable[[int], float]]:
    """The pipeline or bare transformer to optimize, and a function from a side in pixels to the seconds of an image."""
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


def start(how: Start, model: str, r: int, sizes: list[int], steps: int, repeats: int, file: Path) -> Any:
    """What one process measures; ``file``: what a start from a file loads, and a cold one writes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target, timed = painter(model, device, steps)
    if how.windows:
        flexclear.transform(target, r=r)
        flexclear.optimize(
            target, dynamic=how.dynamic, warm_start=file if how.cache == "file" else None, progress=False
        )
    else:
        remember_all_graphs()
        getattr(target, "transformer", target).compile_repeated_blocks(fullgraph=True, dynamic=how.dynamic)
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
            raise RuntimeError(f"an image of a size that was drawn before compiled again, at {side} px: {late}")
    if how.windows and how.cache == "cold":
        transformer = getattr(target, "transformer", target)
        flexclear.compile.save_artifacts(file, artifact_configuration(transformer, None, "default", how.dynamic))
    return {"ready_s": loaded, "first_picture_s": loaded + pictures[0]["first_s"], "pictures": pictures}


def table(rows: list[dict[str, Any]]) -> str:
    """One row a start: the first image, one of a size not seen before, and what the graphs are worth."""
    first, *unseen = (picture["px"] for picture in rows[0]["pictures"])
    heads = [f"first image, {first} px, s", *(f"then first of {px} px, s" for px in unseen)]
    heads += ["graphs, each size", *(f"again at {px} px, s" for px in (first, *unseen))]
    lines = ["| start | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for row in rows:
        made = row["pictures"]
        cells = [f"{row['first_picture_s']:.1f}", *(f"{picture['first_s']:.1f}" for picture in made[1:])]
        cells += [" + ".join(str(picture["graphs"]) for picture in made)]
        cells += [f"{picture['again_s']:.2f}" for picture in made]
        lines.append(f"| {row['start']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    model: Annotated[str, typer.Option(help="embedded (the whole pipeline), or a transformer of pipeline.py.")],
    sizes: Annotated[list[int] | None, typer.Option(min=1, help="Sides in pixels; repeat.")] = None,
    r: Annotated[int, typer.Option(min=1, help="Window radius in tokens.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of an image.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Images of each size after the first; the median counts.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
    child: Annotated[int | None, typer.Option(hidden=True)] = None,
    file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure every start, each in a process of its own."""
    if model not in MODELS:
        raise typer.BadParameter(f"--model must be one of {list(MODELS)}, got {model!r}")
    sides = sizes or ([128, 192, 256] if model == "embedded" else list(MODELS[model].sizes))
    if child is not None and file is not None:
        print(json.dumps(start(STARTS[child], model, r, sides, steps, repeats, file)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status("") as status:
        for number, how in enumerate(STARTS):
            status.update(str(how))
            saved = Path(folder) / f"artifacts-{how.dynamic}.zip"
            # A warm start has the folder of the cold one before it.
            kept = Path(folder) / f"cache{number - (how.cache == 'warm')}"
            command = [
                sys.executable,
                "-m",
                "bench.pipeline.compile",
                f"--model={model}",
                f"--r={r}",
                f"--steps={steps}",
            ]
            command += ["--repeats", str(repeats), "--child", str(number), "--file", str(saved)]
            command += [part for side in sides for part in ("--sizes", str(side))]
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"), "TRITON_CACHE_DIR": str(kept / "triton")}
            done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the start {how} failed: {done.stderr.strip()[-2000:]}")
            rows.append({"start": str(how), **json.loads(done.stdout.splitlines()[-1])})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = facts(device, model=model, r=r, dtype="bfloat16", steps=steps, median_of=repeats)
    text = table(rows)
    write_results(f"compile-{model}-{device.type}", about, rows, text, out)
    print(text)


if __name__ == "__main__":
    typer.run(main)
