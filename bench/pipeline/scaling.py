"""How a step's time and memory grow with the image: a reduced FLUX.1 dense and windowed, from 1k to 36k image tokens.

    python -m bench.pipeline.scaling                                # two CPU cores: some ten minutes
    python -m bench.pipeline.scaling --side 192 --append            # one size anew, the others kept

2 + 4 blocks, 2 heads x 128, bfloat16, random weights, attention alone compiled. Every row is a process of its own: a small
step first, which compiles attention, then as many steps as the budget allows, one at least, and another one for the most
resident memory above what there was before. Exponents are least squares in log-log over the whole sequence, text included.
Results go to bench/results/scaling.{json,md,png}.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from flexclear.compile.files import whole_file
from flexclear.measuring.models import call_of, find_model
from flexclear.measuring.peak import peak_of
from flexclear.measuring.step import build

from bench.machine import RESULTS, facts, write_results
from bench.pipeline.predicted import REDUCED

SIDES = [32, 64, 96, 128, 192]
DTYPE = torch.bfloat16
WARM_UP = (32, 32)
"""Image tokens of the step that compiles."""

LARGE = 9000
"""Image tokens from which on exponents are fitted a second time: below, what does not grow counts too."""


def row(side: int, r: int | None, steps: int, budget: float) -> dict[str, Any]:
    """One row, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(REDUCED))
        model = find_model(folder, DTYPE)
    variants = build(model, [] if r is None else [r], device, blocks=None, compiled=False, dense=r is None)
    step = variants.by_radius[r]
    times: list[float] = []
    with torch.no_grad():
        step(**call_of(model, WARM_UP, device, DTYPE))
        arguments = call_of(model, (side, side), device, DTYPE)
        begun = time.perf_counter()
        while not times or (len(times) < steps and time.perf_counter() - begun + times[-1] < budget):
            start = time.perf_counter()
            step(**arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            step(**arguments)
            peak = torch.cuda.max_memory_allocated(device) - before
        else:
            peak = peak_of(lambda: step(**arguments))
    return {
        "side": side,
        "image_tokens": side * side,
        "tokens": side * side + model.text_len,
        "r": r,
        "step_s": statistics.median(times),
        "times_s": times,
        "peak_bytes": peak,
    }


def in_a_process(side: int, r: int | None, steps: int, budget: float) -> dict[str, Any]:
    """The same, in a process of its own."""
    job = json.dumps({"side": side, "r": r, "steps": steps, "budget": budget})
    command = [sys.executable, "-m", "bench.pipeline.scaling", "--child", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} x {side}, r = {r}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def exponent(rows: list[dict[str, Any]], key: str, least: int = 0) -> float:
    """Slope of ``key`` against tokens in log-log, by least squares, of rows with so many image tokens or more; nan of one."""
    own = [one for one in rows if one["image_tokens"] >= least]
    if len(own) < 2:
        return math.nan
    return float(np.polyfit([math.log(one["tokens"]) for one in own], [math.log(one[key]) for one in own], 1)[0])


def crossing(dense: list[dict[str, Any]], windowed: list[dict[str, Any]]) -> float | None:
    """Image tokens from which on windows are faster, between sizes by straight lines in log-log; None where they are nowhere, 0
    where they are everywhere."""
    known = {one["side"]: one for one in dense}
    points = [
        (math.log(one["image_tokens"]), math.log(known[one["side"]]["step_s"] / one["step_s"]))
        for one in sorted(windowed, key=lambda one: one["side"])
        if one["side"] in known
    ]
    if points[-1][1] <= 0:
        return None
    after = points[-1]
    for before in reversed(points[:-1]):
        if before[1] <= 0:
            share = -before[1] / (after[1] - before[1])
            return math.exp(before[0] + share * (after[0] - before[0]))
        after = before
    return 0.0


def by_radius(rows: list[dict[str, Any]]) -> dict[int | None, list[dict[str, Any]]]:
    """Rows of each radius, dense ones first, by size."""
    radii = sorted({one["r"] for one in rows}, key=lambda r: r or 0)
    return {r: sorted((one for one in rows if one["r"] == r), key=lambda one: one["side"]) for r in radii}


def label(r: int | None) -> str:
    return "dense" if r is None else f"r = {r}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: times and peaks by size, then exponents and where curves cross."""
    groups = by_radius(rows)
    names = list(map(label, groups))
    lines = [
        "| image tokens + text | " + " | ".join(f"{name}: s a step (steps)" for name in names) + " | "
        "gain | " + " | ".join(f"{name}: peak, MiB" for name in names) + " |",
        "|---|" + "---|" * (2 * len(names) + 1),
    ]
    for side in sorted({one["side"] for one in rows}):
        found = {r: next((one for one in own if one["side"] == side), None) for r, own in groups.items()}
        times = [f"{one['step_s']:.3g} ({len(one['times_s'])})" if one else "" for one in found.values()]
        peaks = [f"{one['peak_bytes'] / 2**20:.0f}" if one else "" for one in found.values()]
        dense = found.get(None)
        gains = [f"{dense['step_s'] / one['step_s']:.2f} x" for r, one in found.items() if dense and one and r]
        text = next(one["tokens"] - one["image_tokens"] for one in found.values() if one)
        lines.append(f"| {side} x {side} + {text} | {' | '.join([*times, ', '.join(gains), *peaks])} |")
    lines += [
        "",
        f"| | exponent of time | from {LARGE} image tokens on | exponent of peak memory | faster than dense from |",
        "|---|---|---|---|---|",
    ]
    for r, own in groups.items():
        cross = "" if r is None or None not in groups else _crossing(crossing(groups[None], own))
        time, large = exponent(own, "step_s"), exponent(own, "step_s", LARGE)
        lines.append(f"| {label(r)} | {time:.2f} | {large:.2f} | {exponent(own, 'peak_bytes'):.2f} | {cross} |")
    return "\n".join(lines) + "\n"


def _crossing(tokens: float | None) -> str:
    if tokens is None:
        return "nowhere here"
    return f"{tokens:.0f} image tokens ({16 * math.sqrt(tokens):.0f} px squared)" if tokens else "every size here"


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time and memory against image tokens, log-log, with the fitted exponents in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = (("step_s", 1.0, "s a step"), ("peak_bytes", 2**20, "peak above weights, MiB"))
    for number, (key, scale, name) in enumerate(panels):
        axes = figure.add_subplot(1, 2, number + 1)
        for r, own in by_radius(rows).items():
            style = "ks-" if r is None else "o-"
            text = f"{label(r)}: exponent {exponent(own, key, LARGE):.2f} from {LARGE} tokens on"
            axes.loglog([one["image_tokens"] for one in own], [one[key] / scale for one in own], style, label=text)
        ticks = sorted({one["image_tokens"] for one in rows})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.minorticks_off()
        if key == "peak_bytes":
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_yticks([20, 50, 100, 200, 500])
            axes.yaxis.minorticks_off()
        axes.set(xlabel="image tokens", ylabel=name)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    with whole_file(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


def main(
    side: Annotated[list[int] | None, typer.Option(help="Side in tokens; repeat.")] = None,
    r: Annotated[list[int] | None, typer.Option("--r", help="Window radius; repeat.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a row; the median counts.")] = 7,
    budget: Annotated[float, typer.Option(help="Seconds of a row; one step is made in any case.")] = 20,
    append: Annotated[bool, typer.Option("--append", help="Keep rows of earlier runs that are not run anew.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure and write bench/results/scaling.{json,md,png}."""
    if child is not None:
        print(json.dumps(row(**json.loads(child))))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = facts(device, model="FLUX.1, 2 + 4 blocks, 2 heads x 128", dtype="bfloat16", median_of=f"up to {steps}")
    file = out / "scaling.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if append and file.is_file() else []
    with Console(stderr=True).status("") as status:
        for tokens in side or SIDES:
            for radius in (None, *(r or [8, 16])):
                status.update(f"{tokens} x {tokens}, {label(radius)}")
                new = in_a_process(tokens, radius, steps, budget)
                rows = [one for one in rows if (one["side"], one["r"]) != (tokens, radius)] + [new]
    rows.sort(key=lambda one: (one["side"], one["r"] or 0))
    text = table(rows)
    write_results("scaling", about, rows, text, out)
    plot(rows, f"a step of {about['model']}, bf16: {about['hardware']}", out / "scaling.png")
    print(text)


if __name__ == "__main__":
    typer.run(main)
