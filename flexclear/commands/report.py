"""``flexclear report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexclear.commands.common import must_exist


def report(
    out_dir: Annotated[Path, typer.Argument(help="Folder that flexclear eval and flexclear analyze have written to.")],
    pairs: Annotated[int, typer.Option(min=0, help="Most pairs of images in a section.")] = 12,
) -> None:
    """One HTML page of all results in a folder: settings, tables, curves, images side by side under a slider.

    The page needs no other file and no network.
    """
    must_exist(out_dir)

    from flexclear.analysis.report import write_report

    print(write_report(out_dir, pairs))
