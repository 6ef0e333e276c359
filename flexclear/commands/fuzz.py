"""``flexclear fuzz``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flexclear.commands.common import finite
from flexclear.commands.terminal import console, counter
from flexclear.common.choices import check_choice
from flexclear.common.extras import require


def fuzz(
    seconds: Annotated[float, typer.Option(min=0, callback=finite, help="How long to try.")] = 60,
    device: Annotated[str, typer.Option(help="cpu, or cuda: also checks log-sum-exp and gradients.")] = "cpu",
    window: Annotated[list[str] | None, typer.Option(help="Kind of window; repeat. Default: all.")] = None,
    own: Annotated[
        str | None, typer.Option(help="A mask_mod factory of your own, MODULE:NAME, layout -> mask_mod.")
    ] = None,
    masks_only: Annotated[
        bool, typer.Option(help="Check masks without compiled attention, which takes most of the time.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the random choices. Default: a new one each time.")] = None,
) -> None:
    """Check random masks against their definitions; shrink a failure and print it as Python. Exit status 1 on failure.

    Layouts have up to 70,000 tokens, reference grids and padded text; token orders, pooled keys, costs and the masks of
    several ranks are checked too.
    """
    require("hypothesis", "flexclear fuzz")

    from flexclear import testing
    from flexclear.generation.check import choose_device

    choose_device(device)
    kinds = window or list(testing.strategies.KINDS)
    for kind in kinds:
        check_choice("--window", kind, tuple(testing.strategies.KINDS))
    factory = _load(own) if own else None
    with counter(console()) as progress:
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
    except Exception as error:  # It is the user's module, and may raise anything.
        raise ValueError(f"--own must name a function as MODULE:NAME, {path!r} cannot be loaded: {error}") from error
    if not callable(found):
        raise TypeError(f"--own must name a function layout -> mask_mod, {path!r} is a {type(found).__name__}")
    return found
