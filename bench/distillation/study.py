"""The embedded model distilled for every mechanism of the paper's comparison, and measured against its teacher.

Run ``python -m bench.distillation.study``; it writes ``bench/results/distillation.json``, ``distillation.md`` and two plots, anew
after every run of the table. At 32 x 32 tokens a row takes about 45 minutes of one core, or half a minute of an H100 and its
measuring. Killed at any moment, the same command resumes, a training run from its last checkpoint.
``--rows`` chooses: the names are in ``rows.py``. Once the images are drawn, several processes may work in one folder, each
with rows of its own; single-threaded ones get through sooner than one process with as many threads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flexclear.common.foreign import without_bars, without_diffusers_warnings
from flexclear.compile.files import whole_file

from bench.distillation import report as distillation_report
from bench.distillation.pieces import Interrupted, Settings, Study
from bench.distillation.rows import REAL, REAL_ROW, Comparison
from bench.machine import RESULTS


def write(report: dict[str, Any], output: Path) -> None:
    """JSON, Markdown and plots."""
    output.mkdir(parents=True, exist_ok=True)
    with whole_file(output / "distillation.json") as beside:
        beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    distillation_report.plot_curves(report, output / "distillation-curves.png")
    distillation_report.plot_data(report, output / "distillation-data.png")
    with whole_file(output / "distillation.md") as beside:
        beside.write_text(distillation_report.markdown(report), encoding="utf-8")


@without_bars
@without_diffusers_warnings()
def main(
    rows: Annotated[list[str] | None, typer.Option("--rows", help="Which rows; repeat. Default: all of them.")] = None,
    side: Annotated[int, typer.Option(help="Image tokens along either direction: 16, 32 or 64.")] = 32,
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each run.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per training step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="AdamW's, of the students.")] = 1e-3,
    few_rate: Annotated[float, typer.Option(help="AdamW's, of the few-step model.")] = 5e-4,
    pictures: Annotated[int, typer.Option(min=4, help="Images in each set.")] = 1200,
    held_out: Annotated[int, typer.Option(min=1, help="Of them, kept out of training.")] = 32,
    measured: Annotated[int, typer.Option(min=2, help="Images that each student is measured on.")] = 128,
    denoising: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 16,
    few_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the few-step model.")] = 4,
    seed: Annotated[int, typer.Option(help="Of data, order and noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    drawings: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Another set of emoji than the teacher's, for --rows real-pictures: WebP or PNG files named by code point, such "
            "as the folder assets of the package @lobehub/fluent-emoji-3d (npm pack).",
        ),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the study lives between runs.")] = Path(".distillation"),
    students: Annotated[Path | None, typer.Option(help="For the best students. Default: in --folder.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Train and measure what is missing, and write JSON, Markdown and plots after each piece."""
    torch.set_num_threads(threads)
    todo = Comparison(side).jobs(rows or ())
    if drawings is None:
        if REAL_ROW in (rows or ()):
            raise typer.BadParameter(f"{REAL_ROW} needs drawings that the teacher never saw: pass --drawings")
        todo = [job for job in todo if job.stage != REAL]
    settings = Settings(
        side, steps, batch_size, learning_rate, few_rate, pictures, held_out, measured, denoising, few_steps, seed
    )
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        overall = progress.add_task("study", total=len(todo))
        current = progress.add_task("")
        shown = ""

        def on_item(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                shown = what
                progress.reset(current, description=what, total=total)
            progress.update(current, completed=done, total=total)

        place = students if students is not None else folder / "students"
        study = Study(folder, settings, device, place, on_item, console.print, drawings)
        try:
            for job in todo:
                if not study.done(job):
                    study.run(job)
                    write(study.report(), output)
                progress.advance(overall)
        except (KeyboardInterrupt, Interrupted):
            console.print("interrupted; the same command resumes from there")
            raise typer.Exit(130) from None
    report = study.report()
    write(report, output)
    typer.echo(distillation_report.markdown(report))


if __name__ == "__main__":
    typer.run(main)
