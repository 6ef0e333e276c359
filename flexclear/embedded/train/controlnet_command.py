"""The command ``python -m flexclear.embedded.train controlnet``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexclear.embedded.train.controlnet_recipe import ControlRecipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffusers import FluxControlNetModel, FluxPipeline
    from PIL import Image

DEFAULT = ControlRecipe()
SHEET_STEPS = 12
SHEET_ROWS = 6


def controlnet(
    folder: Annotated[Path, typer.Option(help="Where the checkpoint and contact sheets go.")] = Path(
        ".train/controlnet"
    ),
    font: Annotated[Path | None, typer.Option(help="A NotoColorEmoji.ttf with CBDT bitmaps.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    steps: Annotated[
        int, typer.Option(min=1, help="Total steps; the rate decays to zero at the last.")
    ] = DEFAULT.steps,
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = DEFAULT.batch,
    pictures: Annotated[
        int, typer.Option("--images", min=1, help="Different images, encoded once.")
    ] = DEFAULT.pictures,
    layers: Annotated[int, typer.Option(min=1, help="Double blocks.")] = DEFAULT.layers,
    single_layers: Annotated[int, typer.Option(min=0, help="Single blocks.")] = DEFAULT.single_layers,
    matrix_rate: Annotated[float, typer.Option(help="Learning rate of matrices in blocks.")] = DEFAULT.matrix_rate,
    other_rate: Annotated[float, typer.Option(help="Learning rate of the rest.")] = DEFAULT.other_rate,
    noise_logit: Annotated[float, typer.Option(help="Median of the noise levels' logit.")] = DEFAULT.noise_logit,
    compiled: Annotated[bool, typer.Option(help="Compile the blocks.")] = DEFAULT.compiled,
    seed: Annotated[int, typer.Option(help="Of everything.")] = DEFAULT.seed,
    begin_with: Annotated[
        Path | None, typer.Option(help="Folder of a ControlNet to start from, for example one for an earlier model.")
    ] = None,
    target: Annotated[Path | None, typer.Option(help="The folder to write; the package's by default.")] = None,
) -> None:
    """Train the shipped embedded model's ControlNet (takes minutes). SIGTERM stops it, and the same call resumes."""
    import torch

    from flexclear import embedded
    from flexclear.common.shipped import controlnet_directory
    from flexclear.common.stopping import StopFlag
    from flexclear.embedded.control import FACTS_NAME
    from flexclear.embedded.fingerprint import teacher_fingerprint
    from flexclear.embedded.font import extract_bitmaps
    from flexclear.embedded.train import corpus
    from flexclear.embedded.train.controlnet import export_controlnet, train_controlnet
    from flexclear.embedded.train.controlnet_data import ControlBatchMaker, conditioned_set
    from flexclear.embedded.train.pictures import training_pairs, training_scenes

    torch.set_num_threads(threads)
    recipe = ControlRecipe(
        steps=steps,
        batch=batch,
        pictures=pictures,
        layers=layers,
        single_layers=single_layers,
        matrix_rate=matrix_rate,
        other_rate=other_rate,
        noise_logit=noise_logit,
        compiled=compiled,
        seed=seed,
    )
    pipeline, teacher = embedded.pipeline(), teacher_fingerprint()
    pipeline.set_progress_bar_config(disable=True)
    colours, names = list(corpus.BACKGROUNDS.values()), [item.name for item in corpus.emoji()]
    pairs = training_pairs(len(names), len(colours), corpus.held_out_pairs())
    bitmaps = extract_bitmaps(corpus.EMOJI_CODE_POINTS, font)
    data = conditioned_set(
        pipeline.vae,
        training_scenes(pairs, pictures, seed),
        bitmaps,
        colours,
        folder / "controlnet-latents.pt",
        f"{pictures} images, seed {seed}, model {teacher}",
    )
    maker = ControlBatchMaker(
        data, names, list(corpus.BACKGROUNDS), pipeline.tokenizer, pipeline.tokenizer_2, batch, noise_logit, seed
    )
    with StopFlag() as stop:
        model, done = train_controlnet(
            recipe, pipeline, maker, folder, teacher, stop, _sheet(pipeline, bitmaps), begin_with
        )
    if done < steps:
        typer.echo(f"stopped after {done} of {steps} steps; the same command resumes it")
        raise typer.Exit(1)
    facts: dict[str, Any] = {"teacher": teacher, "steps": steps, "batch": batch, "seed": seed}
    if begin_with is not None:
        facts["began_with"] = json.loads((begin_with / FACTS_NAME).read_text(encoding="utf-8"))
    typer.echo(f"wrote {export_controlnet(model, controlnet_directory() if target is None else target, facts)}")


def _sheet(pipeline: FluxPipeline, bitmaps: Sequence[Image.Image]) -> Callable[[FluxControlNetModel], Image.Image]:
    """Return a function that draws held-out scenes from each of their conditions."""
    from flexclear.embedded.control import MODES
    from flexclear.embedded.controlled import controlled_pipeline, generate_controlled, originals
    from flexclear.embedded.evaluation import held_out_requests
    from flexclear.embedded.train.export import trained_vocabulary
    from flexclear.evaluation.conditions import CONDITIONS
    from flexclear.images.sheet import contact_sheet

    vocabulary = trained_vocabulary()
    requests = held_out_requests(vocabulary, 1, seed=2)[:: len(vocabulary.held_out_pairs) // SHEET_ROWS][:SHEET_ROWS]
    clean = originals(requests, bitmaps, vocabulary)

    def sheet(model: FluxControlNetModel) -> Image.Image:
        guided = controlled_pipeline(pipeline, model)
        columns, titles = [clean], ["original"]
        for kind in MODES:
            conditions = [CONDITIONS[kind](picture) for picture in clean]
            columns += [conditions, generate_controlled(guided, vocabulary, requests, conditions, kind, SHEET_STEPS)]
            titles += [kind, f"drawn from\n{kind}"]
        labels = [vocabulary.emoji[item.emoji].name for item in requests]
        return contact_sheet(list(zip(*columns, strict=True)), labels, titles)

    return sheet
