"""``flexclear explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexclear.commands.common import out_file


def explain(
    height: Annotated[int, typer.Option(min=1, help="Image height in pixels.")],
    width: Annotated[int, typer.Option(min=1, help="Image width in pixels.")],
    r: Annotated[int, typer.Option("--r", min=1, help="Window radius in tokens.")] = 16,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video. Default: an image.")] = None,
    frame_radius: Annotated[
        str | None,
        typer.Option(help="For a video: latent frames on either side that a window sees, or 'all'."),
    ] = None,
    frames_per_token: Annotated[
        int, typer.Option(min=1, help="Frames that the VAE merges into one, after the first: 4; LTX: 8.")
    ] = 4,
    text_len: Annotated[
        int | None,
        typer.Option(min=0, help="Text tokens in attention: 512 for FLUX.1, 333 for SD3. Default: 512; video: 0."),
    ] = None,
    px_per_token: Annotated[int, typer.Option(min=1, help="Pixels per token and side; 1: sizes are in tokens.")] = 16,
    channels: Annotated[
        int, typer.Option(min=1, help="Heads times head dimension: 3072 for FLUX.1, 5120 for Wan 14B.")
    ] = 3072,
    png: Annotated[Path | None, typer.Option(help="Draw one query's window and the block map into this file.")] = None,
    table: Annotated[
        bool, typer.Option(help="Add a table over image sizes, with the sizes at which dense attention is faster.")
    ] = False,
) -> None:
    """Print density, full, partial and skipped blocks, and predicted work of one attention layer for an image or a video."""
    for option, value in (("height", height), ("width", width)):
        if value < px_per_token:
            raise ValueError(f"--{option} must be at least one token's {px_per_token} pixels, got {value}")

    if num_frames is not None and table:
        raise ValueError("--table is over sizes of images; leave it out, or --num-frames")
    if png is not None:
        out_file(png, "--png")
    from flexclear.common.choices import parse_frame_radius

    seen = None if frame_radius is None else parse_frame_radius(frame_radius)

    from flexclear.explanation.window import TEXT_LEN, explain_window, resolution_table

    told = explain_window(
        height,
        width,
        r,
        num_frames=num_frames,
        frame_radius=seen,
        frames_per_token=frames_per_token,
        text_len=text_len,
        px_per_token=px_per_token,
        channels=channels,
    )
    print(told)
    if table:
        print(
            "\n" + resolution_table(r, text_len=TEXT_LEN if text_len is None else text_len, px_per_token=px_per_token)
        )
    if png is not None:
        print(f"image: {told.save(png)}")
