"""``flexclear doctor``."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    device: Annotated[str, typer.Option(help="Device to check; auto: CUDA if available.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Only query, run nothing: saves half a minute of compiling.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what runs here: versions, device, attention, quantization. Exit status 1 if transform cannot run compiled."""
    from flexclear.tools.doctor import diagnose

    found = diagnose(device, quick=quick)
    if json:
        from json import dumps

        typer.echo(dumps(found.as_dict(), indent=2))
    else:
        typer.echo(str(found))
    if found.problem is not None:
        if json:
            typer.echo(f"flexclear: transform does not run compiled here: {found.problem}", err=True)
        raise typer.Exit(1)
