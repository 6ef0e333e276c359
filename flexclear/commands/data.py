"""``flexclear data generate`` and ``flexclear data cache``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexclear.commands.terminal import console, progress_bars

data = typer.Typer(help="Pictures to train on: drawn by the teacher, encoded once.", no_args_is_help=True)


@data.command("generate")
def generate(
    model: Annotated[str, typer.Argument(help="Pipeline folder, hub id, or 'embedded'.")],
    prompts: Annotated[Path, typer.Option(help="Text file with one prompt per line.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures in all; prompts are gone through again and again.")],
    out: Annotated[Path, typer.Option(help="Folder for pictures and captions.")],
    shard: Annotated[str, typer.Option(help="I/N: only every N-th picture from I on, for N processes.")] = "0/1",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; each next one has the next.")] = 0,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels. Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's.")] = None,
    text_len: Annotated[int | None, typer.Option(min=1, help="Text tokens. Default: the pipeline's.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to run; auto: CUDA where there is one.")] = "auto",
) -> None:
    """Draw COUNT pictures with the plain model, each with its caption in a .txt file beside it.

    Pictures that are there are kept: the same command goes on where it was stopped, on any number of processes. Other
    settings than theirs (settings.json) are an error; a deleted caption is written again.
    """
    from flexclear.distill.drawing import DataPlan, draw_data, parse_shard
    from flexclear.generate_settings import DENSE, GenerateSettings, parse_size, read_prompts

    settings = GenerateSettings(
        model=model,
        prompts=read_prompts(prompts),
        out=out.expanduser(),
        sizes=() if size is None else (parse_size(size),),
        seeds=(seed,),
        r=DENSE,
        steps=steps,
        guidance=guidance,
        text_len=text_len,
        dtype=dtype,
        device=device,
    )
    plan = DataPlan(settings, count, parse_shard(shard))
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file")
    total, left = len(plan.numbers()), len(plan.missing())
    lines = console()
    with progress_bars(lines) as progress:
        task = progress.add_task("pictures", total=total, completed=total - left)
        drawn = 0
        try:
            for _ in draw_data(plan, say=lines.print):
                drawn += 1
                progress.update(task, advance=1)
        except KeyboardInterrupt:
            lines.print(f"interrupted: {total - left + drawn} of {total} pictures are finished and kept in {out}")
            raise typer.Exit(130) from None
    print(f"{out}: {drawn} pictures drawn, {total - left} were there already")


@data.command("cache")
def cache(
    source: Annotated[Path, typer.Argument(help="Folder of pictures with captions, of .tar files, or one .tar file.")],
    model: Annotated[str, typer.Option(help="Pipeline folder, hub id, or 'embedded', whose encoders are used.")],
    out: Annotated[Path, typer.Option(help="Folder for the cache.")],
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH that every picture is scaled and cut to. Default: its own size.")
    ] = None,
    text_len: Annotated[int | None, typer.Option(min=1, help="Text tokens. Default: 512; embedded: 64.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per file.")] = 256,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto: bfloat16 on CUDA, else float32.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where to run; auto: CUDA where there is one.")] = "auto",
) -> None:
    """Encode pictures and captions once, so that training loads neither text encoders nor VAE.

    Captions: NAME.txt or NAME.json (with "prompt") beside each picture, in .tar files too; or metadata.jsonl with
    file_name and text. A damaged picture or .tar file is named and skipped. The same command goes on where it was stopped;
    a cache of pictures that were replaced since is an error.
    """
    import torch

    from flexclear.distill.caching import cache as job
    from flexclear.distill.models import text_len_of
    from flexclear.generate_check import choose_device
    from flexclear.generate_settings import DTYPES, parse_size

    place = choose_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {['auto', *DTYPES]}, got {dtype!r}")
    automatic = torch.bfloat16 if place.type == "cuda" else torch.float32
    lines = console()
    with progress_bars(lines) as progress:
        task = progress.add_task("encoding", total=None)
        done = job(
            source,
            model,
            out,
            size=None if size is None else parse_size(size),
            text_len=text_len_of(model) if text_len is None else text_len,
            shard_size=shard_size,
            device=place,
            dtype=automatic if dtype == "auto" else DTYPES[dtype],
            on_item=lambda number, total: progress.update(task, completed=number, total=total),
            say=lines.print,
        )
    print(f"{done.folder}: {done.samples} samples, {len(done.skipped)} skipped")
