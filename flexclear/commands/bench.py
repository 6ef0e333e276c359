"""``flexclear bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexclear.commands.common import finite, out_file
from flexclear.commands.terminal import console, counter
from flexclear.common.choices import DTYPES, EMBEDDED, check_choice, parse_sizes
from flexclear.common.extras import require
from flexclear.measuring.names import CONFIGS

SIZES = {"cpu": "512,1024", "cuda": "1024,2048,4096"}
"""Default sizes by kind of device: what takes minutes."""


def bench(
    model: Annotated[
        str, typer.Argument(help=f"{', '.join(CONFIGS)}, embedded, or a folder with a config.json.")
    ] = "flux.1-dev",
    sizes: Annotated[
        str | None,
        typer.Option(
            help=f"Sides in pixels, or HEIGHTxWIDTH, separated by commas. Default: {SIZES['cpu']} on CPU, else {SIZES['cuda']}."
        ),
    ] = None,
    r: Annotated[str, typer.Option("--r", help="Window radii in tokens, separated by commas.")] = "8,16",
    text_len: Annotated[int | None, typer.Option(min=0, help="Text tokens. Default: the model's.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where to run; auto: CUDA if available.")] = "auto",
    blocks: Annotated[
        int, typer.Option(min=0, help="Blocks of each kind to run; the others are estimated. 0: all.")
    ] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each measurement, of which the median is taken.")] = 5,
    seconds: Annotated[
        float, typer.Option(min=1, callback=finite, help="Time per size, after which no further round starts.")
    ] = 120,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the blocks.")] = False,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory; on a CPU in separate processes.")] = True,
    png: Annotated[Path | None, typer.Option(help="Draw the times into this file; needs matplotlib.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Find the fastest blocks and kernel options first, and keep them.")
    ] = False,
    tune_seconds: Annotated[
        float, typer.Option(min=1, callback=finite, help="Time for tuning, all radii together.")
    ] = 120,
    forget: Annotated[bool, typer.Option("--forget", help="Delete what --tune kept, and do nothing else.")] = False,
) -> None:
    """Measure dense and windowed attention, a step and its memory on this machine, with the shapes of a model.

    Weights are random, and nothing is downloaded. Every result is checked against float32 in the same run. The rates are kept
    in the user's cache folder; flexclear explain predicts with them.
    """
    if forget:
        from flexclear.compile import tuned

        file = tuned.forget()
        print(f"nothing was kept in {tuned.path()}" if file is None else f"deleted {file}")
        return
    parsed = None if sizes is None else parse_sizes(sizes)
    radii = _radii(r)
    check_choice("--dtype", dtype, DTYPES)
    if model not in CONFIGS and model != EMBEDDED and not Path(model).is_dir():
        raise ValueError(f"the model must be one of {[*CONFIGS, EMBEDDED]} or a folder, got {model!r}")
    if png is not None:
        require("matplotlib", "flexclear bench --png")
        out_file(png, "--png")

    import torch

    from flexclear.compile.files import check_user_folder
    from flexclear.generation.check import choose_device
    from flexclear.measuring import tuning
    from flexclear.measuring.report import plot, table
    from flexclear.measuring.run import Job, keep, layout_to_tune, measure

    place = choose_device(device)
    if parsed is None:
        parsed = parse_sizes(SIZES["cuda" if place.type == "cuda" else "cpu"])
    pixels = tuple((one, one) if isinstance(one, int) else one for one in parsed)
    job = Job(
        model=model,
        sizes=pixels,
        radii=radii,
        device=place,
        dtype=getattr(torch, dtype),
        text_len=text_len,
        blocks=blocks or None,
        repeats=repeats,
        seconds=seconds,
        compiled=compile,
        memory=memory,
    )
    known = job.check()
    check_user_folder()
    outcomes: list[tuning.Outcome] = []
    with counter(console()) as progress:
        task = progress.add_task("starting")

        def on(what: str) -> None:
            progress.update(task, description=what)

        if tune:
            outcomes = tuning.tune(
                layout_to_tune(known, pixels),
                radii,
                known.heads,
                known.head_dim,
                job.device,
                job.dtype,
                tune_seconds,
                lambda what: on(f"tuning, {what}"),
            )
        found = keep(measure(job, on))
    if json:
        from json import dumps

        kept = [str(one.kept) for one in outcomes if one.kept is not None]
        typer.echo(dumps({**found.as_dict(), **({"tuned": kept} if tune else {})}, indent=2))
    else:
        for text in [tuning.table(outcomes)] if outcomes else []:
            print(text + "\n")
        print(table(found))
    if png is not None:
        drawn = plot(found, png)
        if not json:
            print(f"plot: {drawn}")


def _radii(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 6 and int(part) for part in parts):
        raise ValueError(f"--r takes window radii in tokens from 1 on, separated by commas, such as 8,16; got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))
