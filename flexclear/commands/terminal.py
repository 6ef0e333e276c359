"""What commands print in addition to their results: lines, warnings and progress bars, all on standard error."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

PROGRAM = "flexclear"


class Output:
    """Verbosity requested on the command line; one instance per process.

    Attributes:
        quiet: no progress and no remarks.
        verbose: log lines, and messages of other libraries.
        debug: tracebacks.
    """

    def __init__(self) -> None:
        self.quiet = self.verbose = self.debug = False

    def ask(self, *, quiet: bool = False, verbose: bool = False, debug: bool = False) -> None:
        """Add the options of a group or a command.

        Raises:
            ValueError: both less and more was asked for.
        """
        self.quiet, self.verbose, self.debug = self.quiet or quiet, self.verbose or verbose, self.debug or debug
        if self.quiet and self.verbose:
            raise ValueError("give --quiet or --verbose, not both")
        if self.verbose:
            logging.getLogger(PROGRAM).setLevel(logging.DEBUG)

    def say(self, text: str) -> None:
        """Print one line on standard error, whatever the verbosity."""
        line = " ".join(part.strip() for part in text.splitlines())
        print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)


output = Output()


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or output.verbose:
            output.say(self.format(record))


@contextlib.contextmanager
def lines_of_a_command() -> Iterator[None]:
    """While a command runs, print warnings and log records as single lines on standard error; then restore everything.

    Deprecation warnings are for developers of flexclear; the other categories are for its users, whoever issues them.
    """

    def show(message: Any, category: type[Warning], *rest: Any) -> None:
        output.say(f"warning: {message}")

    logger, handler = logging.getLogger(PROGRAM), _Lines()
    level, propagate = logger.level, logger.propagate
    asked = dict(vars(output))
    vars(output).update(vars(Output()))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        vars(output).update(asked)


def console(quiet: bool = False) -> Any:
    """Return a rich console that prints text as it is, without added colors or line breaks."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, markup=False, highlight=False, quiet=quiet or output.quiet)


def progress_bars(console: Any, *more: str) -> Any:
    """Return progress bars with their task's name, count and times.

    Args:
        console: where they are drawn.
        more: formats of further columns, such as ``"{task.fields[loss]}"``.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return _progress(
        console,
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *(TextColumn(text) for text in more),
    )


def counter(console: Any) -> Any:
    """Return a line that shows progress, for work without a known end."""
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    return _progress(console, SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())


def _progress(console: Any, *columns: Any) -> Any:
    from rich.progress import Progress

    # On a terminal the bar must know about printed lines; elsewhere they must not go to standard error with it.
    return Progress(*columns, console=console, disable=console.quiet, redirect_stdout=sys.stdout.isatty())
