"""``flexclear play``."""

from __future__ import annotations

from typing import Annotated

import typer

from flexclear.commands.terminal import console, output
from flexclear.common.choices import EMBEDDED
from flexclear.common.extras import require


def play(
    model: Annotated[
        str, typer.Argument(help="Pipeline folder, hub id that is in the cache, or 'embedded': the one in the package.")
    ] = EMBEDDED,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. Any but the loopback address lets other machines draw with the model."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    size: Annotated[
        list[str] | None,
        typer.Option(help="HEIGHTxWIDTH in pixels to offer; repeat. Default: the model's own and some around it."),
    ] = None,
    r: Annotated[
        int | None,
        typer.Option("--r", min=1, help="Window radius in tokens to begin with. Default: that of --weights, or 16."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="Weights to offer: a file, FOLDER_OR_HUB_ID:FILE, or embedded:FILE; repeat."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps to begin with. Default: the pipeline's.")
    ] = None,
    text_len: Annotated[int | None, typer.Option(min=1, help="Text tokens. Default: the pipeline's.")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto: bfloat16 on CUDA, else float32.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where to run; auto: CUDA if available.")] = "auto",
    backend: Annotated[str, typer.Option(help="Attention: auto, flex or sdpa.")] = "auto",
) -> None:
    """A page in your browser: a model draws dense and under windows, and shows what each costs and what a token sees.

    It is served only to this machine unless --host says otherwise, and contacts no other machine. Requests are drawn one after
    the other. Ctrl-C ends it.
    """
    require("gradio", "flexclear play")

    from flexclear.common.choices import parse_size
    from flexclear.play.serving import check_place, serve
    from flexclear.play.settings import PlaySettings, check_play, load_play

    warning = check_place(host, port)
    ready = check_play(
        PlaySettings(
            model=model,
            sizes=tuple(parse_size(text) for text in size or ()),
            r=r,
            weights=tuple(weights or ()),
            steps=steps,
            text_len=text_len,
            dtype=dtype,
            device=device,
            backend=backend,
        )
    )
    if warning is not None:
        output.say(f"warning: {warning}")
    lines = console()
    lines.print(f"loading {model}")

    from flexclear.play.studio import Studio

    studio = Studio(ready, load_play(ready))
    serve(studio, host, port, describe=_describe, ready=lambda address: print(address, flush=True))


def _describe(error: Exception) -> str:
    """The line for the visitor. An error that nobody's input caused is also printed on the terminal."""
    from flexclear.commands.failures import USAGE, describe, show_traceback

    line, status = describe(error)
    if status != USAGE:
        output.say(line)
        if output.debug:
            show_traceback(error)
    return line
