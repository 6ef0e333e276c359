"""``flexclear explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def explain(
    height: Annotated[int, typer.Option(min=1, help="Image height in pixels.")],
    width: Annotated[int, typer.Option(min=1, help="Image width in pixels.")],
    r: Annotated[int, typer.Option("--r", min=1, help="Window radius in tokens.")] = 16,
    text_len: Annotated[int, typer.Option(min=0, help="Text tokens: 512 for FLUX.1, 333 for SD3.")] = 512,
    px_per_token: Annotated[int, typer.Option(min=1, help="Pixels per token and side; 1: sizes are in tokens.")] = 16,
    png: Annotated[Path | None, typer.Option(help="Draw one query's window and the block map into this file.")] = None,
    table: Annotated[
        bool, typer.Option(help="Add a table over image sizes, and where dense attention is faster.")
    ] = False,
) -> None:
    """Print density, full, partial and skipped blocks and the predicted work of one attention layer."""
    for option, value in (("height", height), ("width", width)):
        if value < px_per_token:
            raise ValueError(f"--{option} must be at least one token's {px_per_token} pixels, got {value}")

    from flexclear.explanation.window import explain_window, resolution_table

    told = explain_window(height, width, r, text_len=text_len, px_per_token=px_per_token)
    print(told)
    if table:
        print("\n" + resolution_table(r, text_len=text_len, px_per_token=px_per_token))
    if png is not None:
        print(f"picture: {told.save(png)}")
