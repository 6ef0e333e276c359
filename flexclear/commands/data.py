"""``flexclear data generate`` and ``flexclear data cache``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from flexclear.commands.common import Commands, Ray, RayActors, check_ray, finite, must_exist, out_folder
from flexclear.commands.terminal import console, progress_bars
from flexclear.common.choices import DTYPES, LARGEST_SEED, check_choice, check_seeds

data = Commands("Images to train on: drawn by the teacher, encoded once.")


@data.command("generate")
def generate(
    model: Annotated[str, typer.Argument(help="Pipeline folder, hub id, or 'embedded'.")],
    prompts: Annotated[Path, typer.Option(help="Text file with one prompt per line.")],
    count: Annotated[int, typer.Option(min=1, help="Images in total; prompts repeat in order.")],
    out: Annotated[Path, typer.Option(help="Folder for images and captions.")],
    shard: Annotated[str, typer.Option(help="I/N: only every N-th image from I on, for N processes.")] = "0/1",
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the first image; later ones count up.")
    ] = 0,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels. Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(callback=finite, help="Guidance scale. Default: the pipeline's.")
    ] = None,
    text_len: Annotated[int | None, typer.Option(min=1, help="Text tokens. Default: the pipeline's.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to run; auto: CUDA if available.")] = "auto",
    ray: Ray = None,
    ray_actors: RayActors = None,
) -> None:
    """Draw COUNT images with the original model, each with its caption in a .txt file beside it.

    Existing images are kept: the same command resumes where it was stopped, on any number of processes. It is an error if the
    settings differ from those in settings.json. A deleted caption is written again.
    """
    from flexclear.common.choices import parse_size
    from flexclear.generation.parsing import parse_shard, read_prompts
    from flexclear.generation.settings import DENSE, GenerateSettings

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
    part = parse_shard(shard)
    check_seeds("--seed", seed, count)
    settings.check()
    out_folder(out)
    check_ray(ray, ray_actors)

    from flexclear.distill.drawing import DataPlan, draw_data
    from flexclear.generation.check import choose_device

    if ray is None:
        choose_device(device)

    plan = DataPlan(settings, count, part)
    total, left = len(plan.numbers()), len(plan.missing())
    lines = console()
    with progress_bars(lines) as progress:
        task = progress.add_task("images", total=total, completed=total - left)
        drawn = 0
        try:
            images: Any
            if ray is None:
                images = draw_data(plan, say=lines.print)
            else:
                from flexclear.cluster import data as cluster

                images = cluster.draw_data(plan, ray, ray_actors, lines.print)
            with contextlib.closing(images):
                for _ in images:
                    drawn += 1
                    progress.update(task, advance=1)
        except KeyboardInterrupt:
            lines.print(f"interrupted: {total - left + drawn} of {total} images are finished and kept in {out}")
            raise typer.Exit(130) from None
    print(f"{out}: {drawn} images drawn, {total - left} were there already")


@data.command("cache")
def cache(
    source: Annotated[Path, typer.Argument(help="Folder of images with captions, of .tar files, or one .tar file.")],
    model: Annotated[str, typer.Option(help="Pipeline folder, hub id, or 'embedded', whose encoders are used.")],
    out: Annotated[Path, typer.Option(help="Folder for the cache.")],
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH that every image is scaled and cropped to. Default: its own size.")
    ] = None,
    text_len: Annotated[int | None, typer.Option(min=1, help="Text tokens. Default: 512; embedded: 64.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per file.")] = 256,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto: bfloat16 on CUDA, else float32.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where to run; auto: CUDA if available.")] = "auto",
    ray: Ray = None,
    ray_actors: RayActors = None,
) -> None:
    """Encode images and captions once, so that training loads neither text encoders nor VAE.

    Captions: NAME.txt or NAME.json (with "prompt") beside each image, in .tar files too; or metadata.jsonl with file_name and
    text. A damaged image or .tar file is named and skipped. The same command resumes where it was stopped. If images have been
    replaced since they were cached, that is an error.
    """
    from flexclear.common.choices import parse_size
    from flexclear.generation.settings import model_folder

    check_choice("--dtype", dtype, ("auto", *DTYPES))
    sides = None if size is None else parse_size(size)
    model_folder(model)
    must_exist(source, "no folder of images and no .tar file at")
    out_folder(out)
    check_ray(ray, ray_actors)

    from flexclear.distill.caching import cache as job
    from flexclear.distill.models import text_len_of
    from flexclear.generation.check import choose_device, choose_dtype

    place = choose_device(device) if ray is None else None
    tokens = text_len_of(model) if text_len is None else text_len
    lines = console()
    with progress_bars(lines) as progress:
        task = progress.add_task("encoding", total=None)
        options: Any = {"size": sides, "text_len": tokens, "shard_size": shard_size, "say": lines.print}
        options["on_item"] = lambda number, total: progress.update(task, completed=number, total=total)
        if place is not None:
            done = job(source, model, out, device=place, dtype=choose_dtype(dtype, place), **options)
        else:
            from flexclear.cluster import data as cluster

            done = cluster.cache(source, model, out, str(ray), ray_actors, device=device, dtype=dtype, **options)
    print(f"{done.folder}: {done.samples} samples, {len(done.skipped)} skipped")
