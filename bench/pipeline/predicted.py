"""Gains of a step, predicted and measured: whether what ``flexclear explain`` says comes out.

    python -m bench.pipeline.predicted                       # a reduced FLUX.1: 2 + 4 blocks, 2 heads x 128

Rates are measured first, as ``flexclear bench`` measures them, at sizes other than those that are predicted. ``explain`` predicts
with them what it predicts for a user; then the same models are timed, dense and windowed by turns, on one sample with random
weights. Exit status 1 where a gain is off by more than a quarter. Results go to bench/results/predicted.{json,md}.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import flexclear
from flexclear.compile.files import USER_FOLDER
from flexclear.measuring.models import find_model
from flexclear.measuring.run import Job, keep, measure
from flexclear.measuring.step import build, grid_of, measure_steps

from bench.machine import RESULTS, facts, write_results

REDUCED: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "guidance_embeds": True,
    "num_layers": 2,
    "num_single_layers": 4,
    "num_attention_heads": 2,
}
"""FLUX.1-dev where nothing is named: heads of 128 channels."""

BAR = 0.25
"""How far a predicted gain may be from the measured one."""


def compare(job: Job, rates_at: tuple[tuple[int, int], ...], on: Any) -> tuple[list[dict[str, Any]], str]:
    """A row for each size and radius of ``job``, and the rates, which were measured at the sizes ``rates_at``."""
    found = keep(measure(replace(job, sizes=rates_at, memory=False), on))
    model = find_model(job.model, job.dtype, job.text_len)
    variants = build(model, list(job.radii), job.device, blocks=None, compiled=job.compiled)
    rows = []
    for size in job.sizes:
        on(f"{size[0]} x {size[1]} px")
        grid = grid_of(size, model)
        steps = measure_steps(variants, grid, job.device, job.dtype, repeats=job.repeats, seconds=job.seconds)
        dense = steps[0].median_s
        for step in steps[1:]:
            told = flexclear.explain(
                variants.by_radius[step.radius], height=size[0], width=size[1], text_len=model.text_len
            )
            assert told.seconds is not None
            measured = dense / step.median_s
            layer = told.layers[0].cost
            assert layer is not None
            rows.append(
                {
                    "px": size[0],
                    "tokens": f"{grid[0]} x {grid[1]} + {model.text_len}",
                    "r": step.radius,
                    "dense_s": dense,
                    "windowed_s": step.median_s,
                    "rounds": len(step.seconds),
                    "measured": measured,
                    "predicted_dense_s": told.seconds.dense_step,
                    "predicted_windowed_s": told.seconds.step,
                    "predicted": told.seconds.gain,
                    "predicted_attention": told.seconds.dense / told.seconds.attention,
                    "pairs": layer.predicted_speedup,
                    "off": told.seconds.gain / measured - 1,
                }
            )
    return rows, str(found.rates)


def table(rows: list[dict[str, Any]], rates: str) -> str:
    """Markdown."""
    lines = [
        "| image tokens + text | r | step dense, s (predicted) | windows, s (predicted) | gain measured | gain predicted | "
        "off by | of attention alone, predicted | by pairs alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['tokens']} | {row['r']} | {row['dense_s']:.3g} ({row['predicted_dense_s']:.3g}) | {row['windowed_s']:.3g} "
        f"({row['predicted_windowed_s']:.3g}) | {row['measured']:.2f} x | {row['predicted']:.2f} x | {row['off']:+.0%} | "
        f"{row['predicted_attention']:.2f} x | {row['pairs']:.1f} x |"
        for row in rows
    ]
    return "\n".join([*lines, "", f"Rates {rates}.", ""])


def main(
    sizes: Annotated[list[int] | None, typer.Option(help="Sides in pixels that are predicted; repeat.")] = None,
    rates_at: Annotated[list[int] | None, typer.Option(help="Sides that rates are measured at; repeat.")] = None,
    r: Annotated[list[int] | None, typer.Option("--r", help="Window radius in tokens; repeat.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 7,
    seconds: Annotated[float, typer.Option(help="For a size, after which no further round is begun.")] = 120,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure, predict, measure again, and write bench/results/predicted.{json,md}."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status("") as status:
        os.environ[USER_FOLDER] = folder  # neither what is kept for the user nor what this keeps for them
        named = Path(folder) / "flux-reduced"
        named.mkdir()
        (named / "config.json").write_text(json.dumps(REDUCED))
        job = Job(
            model=str(named),
            sizes=tuple((side, side) for side in sizes or [768, 1024, 1536]),
            radii=tuple(r or [8, 16]),
            device=device,
            dtype=torch.bfloat16,
            blocks=None,
            repeats=repeats,
            seconds=seconds,
        )
        measured_at = tuple((side, side) for side in rates_at or [640, 1280])
        rows, rates = compare(job, measured_at, status.update)
        rates = rates.replace(f"{folder}/", "")
    about = facts(
        device,
        model="FLUX.1, 2 + 4 blocks, 2 heads x 128",
        dtype="bfloat16",
        rates_measured_at=", ".join(f"{side} px" for side, _ in measured_at),
        median_of=repeats,
        rates=rates,
    )
    text = table(rows, rates)
    write_results("predicted", about, rows, text, out)
    print(text)
    if any(abs(row["off"]) > BAR for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
