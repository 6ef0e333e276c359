"""``flexclear soak``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from flexclear.commands.common import finite
from flexclear.commands.terminal import console, counter
from flexclear.common.choices import BACKENDS, EMBEDDED, LARGEST_SEED, check_choice


def soak(
    model: Annotated[
        str, typer.Option(help="embedded, a pipeline's folder, or MODULE:NAME of a function that makes one.")
    ] = "embedded",
    seconds: Annotated[float, typer.Option(min=0, callback=finite, help="How long to run.")] = 60,
    calls: Annotated[int | None, typer.Option(min=1, help="Stop after that many calls.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of everything random.")] = 0,
    backend: Annotated[str, typer.Option(help="auto, flex or sdpa.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the blocks.")] = False,
    sizes: Annotated[int, typer.Option(min=1, help="Number of different sizes.")] = 8,
    largest: Annotated[int, typer.Option(min=1, help="Largest side in pixels.")] = 192,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    growth: Annotated[float, typer.Option(callback=finite, help="MiB that memory may grow after warm-up.")] = 16,
    samples: Annotated[int, typer.Option(min=0, help="Images to compare with a fresh process.")] = 6,
) -> None:
    """Ask one pipeline for hundreds of random images. Exit status 1 if memory, graphs or caches grow, or if an image is
    not what a fresh process draws."""
    check_choice("--backend", backend, BACKENDS)
    if model != EMBEDDED and not Path(model).expanduser().is_dir() and re.fullmatch(r"[\w.]+:\w+", model) is None:
        raise ValueError(
            f"--model must be {EMBEDDED!r}, a pipeline's folder, or MODULE:NAME; there is no folder {model}"
        )

    from flexclear.generation.check import choose_device
    from flexclear.tools.soak import Bounds, soak_test
    from flexclear.tools.soak_calls import Settings

    choose_device(device)
    settings = Settings(
        model=model,
        seed=seed,
        backend=backend,
        compile=compile,
        sizes=sizes,
        largest=largest,
        device=device,
    )
    with counter(console()) as progress:
        task = progress.add_task("starting")
        found = soak_test(
            settings,
            Bounds(growth_mib=growth, samples=samples),
            seconds=seconds if calls is None else float("inf"),
            max_calls=calls,
            on_call=lambda count: progress.update(task, description=f"{count} calls"),
        )
    print(found)
    if found.failures:
        raise typer.Exit(1)
