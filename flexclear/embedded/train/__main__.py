"""Train the embedded model: ``python -m flexclear.embedded.train`` with vae, transformer, export, then controlnet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexclear.embedded.train.controlnet_command import controlnet

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)

Folder = Annotated[Path, typer.Option("--folder", help="Where checkpoints and contact sheets go.")]
Font = Annotated[Path | None, typer.Option("--font", help="A NotoColorEmoji.ttf with CBDT bitmaps.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")]


@app.callback()
def main() -> None:
    """Train the embedded model, one step after the other."""


@app.command()
def vae(folder: Folder = Path(".train"), font: Font = None, threads: Threads = 2, steps: int = 1400) -> None:
    """Train the autoencoder (about 8 minutes on two CPU cores)."""
    import torch

    from flexclear.embedded.font import extract_bitmaps
    from flexclear.embedded.train import corpus
    from flexclear.embedded.train.pictures import training_pairs
    from flexclear.embedded.train.vae import VaeRecipe, train_vae

    torch.set_num_threads(threads)
    colours = list(corpus.BACKGROUNDS.values())
    pairs = training_pairs(len(corpus.EMOJI_CODE_POINTS), len(colours), corpus.held_out_pairs())
    bitmaps = extract_bitmaps(corpus.EMOJI_CODE_POINTS, font)
    train_vae(VaeRecipe(steps=steps), pairs, bitmaps, colours, folder)


@app.command()
def begin(
    folder: Folder = Path(".train"),
    source: Annotated[Path | None, typer.Option(help="A folder that export wrote; the package's by default.")] = None,
    run: Annotated[Path | None, typer.Option(help="A file that pack wrote, to continue its run.")] = None,
) -> None:
    """Write checkpoints for ``transformer`` and ``export`` that resume from an exported model or a packed run."""
    from flexclear.embedded import model_directory
    from flexclear.embedded.train.assembly import begin_with
    from flexclear.embedded.train.carried import unpack_run

    model = model_directory() if source is None else source
    typer.echo(f"wrote {begin_with(model, folder) if run is None else unpack_run(run, model, folder)}")


@app.command()
def pack(file: Annotated[Path, typer.Argument(help="The file to write.")], folder: Folder = Path(".train")) -> None:
    """Write a run of ``transformer`` to one file of at most 10 MiB, for ``begin --run`` on another machine."""
    from flexclear.embedded.train.carried import pack_run

    typer.echo(f"wrote {pack_run(folder, file)}")


@app.command()
def transformer(
    folder: Folder = Path(".train"),
    font: Font = None,
    threads: Threads = 2,
    steps: Annotated[int | None, typer.Option(help="Total steps; without it the rate stays flat.")] = None,
    decay_from: Annotated[int | None, typer.Option(help="First step of the decay.")] = None,
    compiled: Annotated[bool, typer.Option(help="Compile the transformer's blocks.")] = True,
    small_pictures: Annotated[int, typer.Option("--small-images", help="Images of 128 pixels to encode.")] = 18_000,
    large_pictures: Annotated[int, typer.Option("--large-images", help="Images of 256 pixels to encode.")] = 2_000,
    still: Annotated[bool, typer.Option(help="Images without jitter; use them first, to learn names.")] = False,
    faint: Annotated[
        float, typer.Option(min=0, help="Show low-contrast pairs more often: the power of their weight.")
    ] = 0.0,
    unnamed: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of images on backgrounds of other colours, which no caption names."),
    ] = 0.0,
    noisier: Annotated[float, typer.Option(help="Added to the noise levels' logits, whose median is 0.5.")] = 0.0,
    large_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of batches at 256 pixels; three tenths by default.")
    ] = None,
    matrix_rate: Annotated[float, typer.Option(help="Muon's learning rate.")] = 7e-3,
    guided_from: Annotated[
        int | None, typer.Option(help="First step that trains for use without classifier-free guidance.")
    ] = None,
) -> None:
    """Train the transformer and the text encoders (over an hour on two CPU cores); SIGTERM stops it."""
    import torch

    from flexclear.embedded.train.run import run_transformer
    from flexclear.embedded.train.transformer import TransformerRecipe

    torch.set_num_threads(threads)
    run_transformer(
        TransformerRecipe(matrix_rate=matrix_rate, compiled=compiled, guided_from=guided_from),
        folder,
        font,
        small_pictures,
        large_pictures,
        steps,
        decay_from,
        still,
        faint,
        unnamed,
        noisier,
        large_share,
    )


@app.command()
def measure(
    folder: Folder = Path(".train"),
    font: Font = None,
    threads: Threads = 2,
    pictures: Annotated[int, typer.Option("--images", help="Images to draw, spread over the emoji.")] = 512,
    strength: Annotated[float, typer.Option(help="Weight gained by an emoji that is never right.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Backgrounds and noise; not the seed of the results.")] = 5,
) -> None:
    """Draw every emoji, and write how often ``transformer`` should show each from now on."""
    import torch

    from flexclear.embedded.font import extract_bitmaps
    from flexclear.embedded.retrieval import Retriever
    from flexclear.embedded.train import corpus
    from flexclear.embedded.train.assembly import load_trained
    from flexclear.embedded.train.emphasis import measure_emphasis, write_emphasis
    from flexclear.embedded.train.export import trained_vocabulary

    torch.set_num_threads(threads)
    retriever = Retriever(extract_bitmaps(corpus.EMOJI_CODE_POINTS, font), list(corpus.BACKGROUNDS.values()))
    weights = measure_emphasis(load_trained(folder), retriever, trained_vocabulary(), pictures, strength, seed)
    typer.echo(f"wrote {write_emphasis(folder, weights)}")


@app.command()
def export(
    folder: Folder = Path(".train"),
    target: Annotated[Path | None, typer.Option(help="The folder to write; the package's by default.")] = None,
) -> None:
    """Write the trained parts as a FluxPipeline folder in bfloat16."""
    from flexclear.embedded import model_directory
    from flexclear.embedded.train.export import export_model

    written = export_model(folder, model_directory() if target is None else target)
    typer.echo(f"wrote {written}")


app.command()(controlnet)

if __name__ == "__main__":
    app()
