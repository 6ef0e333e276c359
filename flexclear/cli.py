"""The command line: ``flexclear demo``, ``flexclear explain``, ``flexclear fuzz``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Pretrained diffusion transformers made linear in image size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEMO_PROMPTS = (
    "a red apple on a blue background",
    "a sunflower on a white background",
    "a rocket on a yellow background",
    "an octopus on a green background",
)


@app.command()
def demo(
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; repeat for more. Default: four prompts.")
    ] = None,
    r: Annotated[
        list[int] | None, typer.Option("--r", help="Window radius in tokens; repeat. Default: 3, 4, 6, 8.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the contact sheet and the table.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise.")] = 0,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 16,
    size: Annotated[int, typer.Option(min=64, help="Picture side in pixels, a multiple of 8.")] = 128,
) -> None:
    """Draw prompts with the embedded pipeline, dense and under several windows, side by side."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from flexclear import embedded
    from flexclear.masks import Disc

    prompts, radii = list(prompt or DEMO_PROMPTS), list(r or (3, 4, 6, 8))
    for radius in radii:
        Disc(radius)
    if size % 8:
        raise ValueError(f"--size must be a multiple of 8 pixels, got {size}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file")
    console = Console()
    for text in prompts:
        strangers = embedded.unknown_words(text)
        if strangers:
            console.print(
                f"The embedded model was not trained on: {', '.join(strangers)} (in {text!r}). It draws all the same.",
                markup=False,
                highlight=False,
            )
    from flexclear.demo import markdown_table, run_variants, write

    columns = (
        TextColumn("{task.description:>7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loading", total=(1 + len(radii)) * len(prompts) * steps)
        pipe = embedded.pipeline()
        pipe.set_progress_bar_config(disable=True)
        variants = run_variants(
            pipe,
            prompts,
            radii,
            seed=seed,
            steps=steps,
            side=size,
            on_step=lambda label: progress.update(task, advance=1, description=label),
        )
    picture, table = write(variants, prompts, out)
    print(f"{markdown_table(variants)}\npictures: {picture}\ntable:    {table}")


@app.command()
def explain(
    height: Annotated[int, typer.Option(help="Picture height in pixels.")],
    width: Annotated[int, typer.Option(help="Picture width in pixels.")],
    r: Annotated[int, typer.Option("--r", help="Window radius in tokens.")] = 16,
    text_len: Annotated[int, typer.Option(help="Text tokens: 512 for FLUX.1, 333 for SD3.")] = 512,
    px_per_token: Annotated[int, typer.Option(min=1, help="Pixels per token and side; 1: sizes are in tokens.")] = 16,
    png: Annotated[Path | None, typer.Option(help="Draw one query's window and the block map into this file.")] = None,
    table: Annotated[
        bool, typer.Option(help="Add a table over picture sizes, and where dense attention is faster.")
    ] = False,
) -> None:
    """Print density, full, partial and skipped blocks and the predicted work of one attention layer."""
    from flexclear.window_explanation import explain_window, resolution_table

    told = explain_window(height, width, r, text_len=text_len, px_per_token=px_per_token)
    print(told)
    if table:
        print("\n" + resolution_table(r, text_len=text_len, px_per_token=px_per_token))
    if png is not None:
        print(f"picture: {told.save(png)}")


@app.command()
def fuzz(
    seconds: Annotated[float, typer.Option(help="How long to try.")] = 60,
    device: Annotated[str, typer.Option(help="cpu, or cuda: log-sum-exp and gradients too.")] = "cpu",
    window: Annotated[list[str] | None, typer.Option(help="Kind of window; repeat. Default: all.")] = None,
    own: Annotated[
        str | None, typer.Option(help="A mask_mod factory of your own, MODULE:NAME, layout -> mask_mod.")
    ] = None,
    masks_only: Annotated[
        bool, typer.Option(help="Check masks without running attention: a hundred times as many.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of the random choices. Default: another one each time.")] = None,
) -> None:
    """Try random masks against the dense reference; shrink a failure and print it as Python. Exit status 1 on failure."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from flexclear import testing

    kinds = window or list(testing.strategies.KINDS)
    factory = _load(own) if own else None
    console = Console()
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("starting")
        report = testing.fuzz(
            seconds,
            kinds=kinds,
            device=device,
            attention=not masks_only,
            own=factory,
            seed=seed,
            on_example=lambda count: progress.update(task, description=f"{count} examples"),
        )
    print(
        f"{report.examples} examples in {report.seconds:.0f} s: {'no failure' if report.failure is None else 'FAILURE'}"
    )
    if report.failure is not None:
        print(f"\n{report.error}\n\n{report.failure.as_python(device)}")
        raise typer.Exit(1)


def _load(path: str) -> Callable[[Any], Any]:
    """The function that ``MODULE:NAME`` names; the working folder is searched too."""
    import importlib

    module, _, name = path.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--own must name a function as MODULE:NAME, {path!r} cannot be loaded: {error}") from error
    if not callable(found):
        raise TypeError(f"--own must name a function layout -> mask_mod, {path!r} is a {type(found).__name__}")
    return found


def main() -> None:
    """Run the command line. A bad argument is one line on standard error and exit status 2, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"flexclear: {error}", file=sys.stderr)
        sys.exit(2)
