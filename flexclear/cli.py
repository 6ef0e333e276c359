"""The command line: ``flexclear generate``, ``doctor``, ``demo``, ``explain``, ``fuzz``, ``soak``,
``data generate``, ``data cache``, ``distill``, ``eval``, ``analyze``, ``report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from flexclear.commands.analyze import analyze
from flexclear.commands.data import data
from flexclear.commands.demo import demo
from flexclear.commands.distill import distill
from flexclear.commands.doctor import doctor
from flexclear.commands.evaluate import evaluation
from flexclear.commands.explain import explain
from flexclear.commands.fuzz import fuzz
from flexclear.commands.generate import generate
from flexclear.commands.report import report
from flexclear.commands.soak import soak

app = typer.Typer(
    help="Pretrained diffusion transformers made linear in image size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, doctor, demo, explain, fuzz, soak, distill, report):
    app.command()(command)
app.add_typer(data, name="data")
app.add_typer(evaluation, name="eval")
app.add_typer(analyze, name="analyze")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A bad argument is one line on standard error and exit status 2, not a traceback.

    Args:
        arguments: what follows the program's name; that of this process by default.
    """
    try:
        app(args=None if arguments is None else list(arguments))
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"flexclear: {error}", file=sys.stderr)
        sys.exit(2)
