"""The command line: ``flexclear generate``, ``settings``, ``doctor``, ``demo``, ``play``, ``explain``, ``bench``, ``fuzz``,
``soak``, ``data generate``, ``data cache``, ``distill``, ``eval``, ``analyze``, ``report``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Results go to standard output. Everything else, such as progress and warnings, goes to standard error. An error is one line
    there, with a traceback only under ``--debug``.

    Exit status: 0 for success; 1 if the command could not finish or found what it looks for; 2 for a bad argument, setting or
    file; 70 for a fault in flexclear itself; 130 after Ctrl-C.

    Args:
        arguments: arguments after the program's name; by default those of this process.
    """
    # Imported here, so that Ctrl-C during these imports also prints only one line.
    try:
        from flexclear.commands.running import run
    except KeyboardInterrupt:
        sys.exit(130)
    run(arguments)


def __getattr__(name: str) -> Any:
    if name == "app":
        from flexclear.commands.application import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
