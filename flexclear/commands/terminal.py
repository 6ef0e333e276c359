"""What the commands' lines and progress bars look like; both go to standard error, programs read standard output."""

from __future__ import annotations

from typing import Any


def console(quiet: bool = False) -> Any:
    """Return a rich console that prints text as it is, without colours of its own or line breaks."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, markup=False, highlight=False, quiet=quiet)


def progress_bars(console: Any, *more: str, **options: Any) -> Any:
    """Return progress bars with their task's name, count and times.

    Args:
        console: where they are drawn.
        more: formats of further columns, such as ``"{task.fields[loss]}"``.
        options: of ``rich.progress.Progress``.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *(TextColumn(text) for text in more),
    ]
    return Progress(*columns, console=console, **options)
