"""``flexclear distill``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flexclear.commands.common import must_exist
from flexclear.commands.terminal import console, progress_bars


def distill(
    config: Annotated[Path, typer.Argument(help="YAML file with the settings; see flexclear.distill.DistillConfig.")],
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say how much memory the run would take; needs no weights.")
    ] = False,
    pixels: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH for --estimate. Default: 1024x1024.")] = None,
    text_len: Annotated[int, typer.Option(min=1, help="Text tokens for --estimate.")] = 512,
) -> None:
    """Train a model's attention to match its dense self under a window.

    The same command resumes where it was stopped. For several GPUs: accelerate launch -m flexclear distill CONFIG.
    """
    from flexclear.common.choices import parse_size

    size = (1024, 1024) if pixels is None else parse_size(pixels)
    must_exist(config, "no file")

    from flexclear.distill.config import read_config

    settings = read_config(config)
    if estimate:
        from flexclear.distill.estimate import estimate as job

        assert settings.model is not None
        print(job(settings, size, text_len))
        return
    from flexclear.distill.trainer import distill as train

    # With several processes, as started by torchrun and accelerate launch, only the first one prints.
    first = os.environ.get("RANK", "0") == "0"
    lines = console(quiet=not first)
    with progress_bars(lines, "{task.fields[loss]}") as progress:
        task = progress.add_task("steps", total=settings.steps, loss="")

        def on_step(record: dict[str, float]) -> None:
            progress.update(task, completed=int(record["step"]), loss=f"loss {record['loss']:.4f}")

        done = train(config=settings, on_step=on_step, say=lines.print)
    if done.interrupted:
        raise typer.Exit(130)
    for record in done.held_out[-1:]:
        lines.print("held out: " + ", ".join(f"{name} {value:.5g}" for name, value in record.items()))
    if first:
        print(f"weights: {done.weights}")
