"""Does the embedded model draw what it is asked for? Top-1 retrieval, dense and with CLEAR windows.

Run ``python -m bench.quality.retrieval``; it writes ``bench/results/retrieval.json`` and ``retrieval.md``.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import transformers
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import flexclear
from flexclear import embedded
from flexclear.embedded.evaluation import (
    Request,
    Score,
    evaluate,
    generate,
    held_out_requests,
    picture_psnr,
    trained_requests,
)
from flexclear.embedded.font import DEFAULT_FONT_PATH, extract_bitmaps
from flexclear.embedded.reference import read_reference_sheet
from flexclear.embedded.retrieval import Retriever
from flexclear.embedded.validation import clean_pictures, vae_round_trip
from flexclear.embedded.vocabulary import Vocabulary, read_vocabulary

from bench.machine import RESULTS, facts

RADII = (2, 3, 4, 6, 8)


def main(
    trained: Annotated[int, typer.Option(min=1, help="Images of trained pairs, dense.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Images per held-out pair, dense.")] = 3,
    windowed: Annotated[int, typer.Option(min=1, help="Images of trained pairs per window.")] = 64,
    large: Annotated[
        int, typer.Option(min=0, help="Images of 256 pixels, dense, of trained and of held-out pairs.")
    ] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 16,
    seed: Annotated[int, typer.Option(help="Chooses the pairs and the noise.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure top-1 retrieval of the embedded model and write JSON and Markdown."""
    torch.set_num_threads(threads)
    started = time.monotonic()
    vocabulary = read_vocabulary(embedded.model_directory())
    retriever, source = _retriever(vocabulary)
    pipe = embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    seen = trained_requests(vocabulary, trained, seed)
    unseen = held_out_requests(vocabulary, repeats, seed)
    seen_large = trained_requests(vocabulary, large, seed + 1) if large else []
    unseen_large = held_out_requests(vocabulary, repeats, seed + 1)[:large]
    few = seen[:windowed]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    scores: dict[str, Score] = {}
    windows: list[dict[str, Any]] = []
    with Progress(*columns) as progress:
        total = len(seen) + len(unseen) + len(seen_large) + len(unseen_large) + windowed * len(RADII)
        task = progress.add_task("dense", total=total)

        def draw(requests: list[Request], pixels: int = 128) -> torch.Tensor:
            return generate(pipe, vocabulary, requests, steps, pixels, on_done=lambda n: progress.advance(task, n))

        clean, wanted = clean_pictures(vocabulary, _bitmaps(vocabulary)[0], len(vocabulary.emoji) * 2, seed)
        scores["clean drawings"] = evaluate(retriever, wanted, clean)
        scores["autoencoder round trips"] = evaluate(retriever, wanted, vae_round_trip(pipe.vae, clean))
        dense = draw(seen)
        scores["trained pairs"] = evaluate(retriever, seen, dense)
        scores["held-out pairs"] = evaluate(retriever, unseen, draw(unseen))
        if seen_large:
            scores["trained pairs, 256 px"] = evaluate(retriever, seen_large, draw(seen_large, 256))
            scores["held-out pairs, 256 px"] = evaluate(retriever, unseen_large, draw(unseen_large, 256))
        for radius in RADII:
            progress.update(task, description=f"window r={radius}")
            flexclear.transform(pipe, r=radius)
            pictures = draw(few)
            flexclear.restore(pipe)
            levels = picture_psnr(pictures, dense[: len(few)])
            windows.append(
                {
                    "r": radius,
                    **asdict(evaluate(retriever, few, pictures)),
                    "psnr_median": levels.median().item(),
                    "psnr_lowest": levels.min().item(),
                }
            )
    report = {
        "environment": facts(
            torch.device("cpu"), diffusers=diffusers.__version__, transformers=transformers.__version__
        ),
        "settings": {
            "steps": steps,
            "seed": seed,
            "max_sequence_length": 32,
            "clean_drawings": source,
            "seconds": round(time.monotonic() - started, 1),
        },
        "scores": {name: asdict(value) for name, value in scores.items()},
        "windows": windows,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "retrieval.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "retrieval.md").write_text(_markdown(report), encoding="utf-8")
    typer.echo(_markdown(report))


def _bitmaps(vocabulary: Vocabulary) -> tuple[list[Any], str]:
    if DEFAULT_FONT_PATH.is_file():
        points = [item.code_point for item in vocabulary.emoji]
        return extract_bitmaps(points), "the Noto Color Emoji font"
    drawings = read_reference_sheet(embedded.model_directory(), len(vocabulary.emoji))
    return drawings, "the reference sheet in the model folder"


def _retriever(vocabulary: Vocabulary) -> tuple[Retriever, str]:
    bitmaps, source = _bitmaps(vocabulary)
    return Retriever(bitmaps, list(vocabulary.backgrounds.values())), source


def _markdown(report: dict[str, Any]) -> str:
    environment, settings = report["environment"], report["settings"]
    lines = [
        "# Embedded model: top-1 retrieval",
        "",
        "An image counts as right when, of all clean drawings of all emoji "
        f"({settings['clean_drawings']}; every place, several sizes, both mirrorings), the nearest one shows "
        "the emoji of the prompt, and when the background colour nearest to the image's frame is the one of "
        "the prompt.",
        "",
        f"{environment['hardware']}; torch {environment['torch']}, "
        f"diffusers {environment['diffusers']}, transformers {environment['transformers']}; "
        f"{settings['steps']} denoising steps, seed {settings['seed']}, max_sequence_length "
        f"{settings['max_sequence_length']}, {settings['seconds']:.0f} s in all.",
        "",
        "| images | n | emoji | background | both |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in report["scores"].items():
        lines.append(f"| {name} | {row['pictures']} | {_shares(row)} |")
    lines += [
        "",
        "CLEAR windows on the same weights, without further training; PSNR against the dense image of the "
        "same seed. One token is 8 px here, and the image is 16 tokens wide.",
        "",
        "| window | n | emoji | background | both | PSNR median | PSNR lowest |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["windows"]:
        levels = f"{row['psnr_median']:.1f} dB | {row['psnr_lowest']:.1f} dB"
        lines.append(f"| r = {row['r']} | {row['pictures']} | {_shares(row)} | {levels} |")
    return "\n".join(lines) + "\n"


def _shares(row: dict[str, Any]) -> str:
    return " | ".join(f"{100 * row[key]:.1f} %" for key in ("emoji", "background", "both"))


if __name__ == "__main__":
    typer.run(main)
