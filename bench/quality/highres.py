"""The embedded model above the largest size of its training: directly, and enlarged stage by stage.

The cascades are what ``upscale_cascade`` draws where nothing is set, the released settings of each method, and SDEdit at a
lower strength; with windows and without. ``--ablation`` changes one of the released settings at a time.

Run ``python -m bench.quality.highres`` (needs ``pip install -e '.[eval]'``); it writes ``highres.json``, ``highres.md`` and
``highres.png`` into ``bench/results``.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flexclear import embedded
from flexclear.embedded.captions import caption
from flexclear.embedded.evaluation import Request, evaluate, trained_requests
from flexclear.embedded.fingerprint import students_fingerprint, teacher_fingerprint
from flexclear.embedded.reference import read_reference_sheet
from flexclear.embedded.retrieval import Retriever
from flexclear.embedded.vocabulary import read_vocabulary
from flexclear.highres import seam_ratio, tiled
from flexclear.highres.tiling import OVERLAP, tile_size
from flexclear.images.sheet import contact_sheet

from bench.machine import RESULTS, facts, write_results
from bench.quality.enlarged import (
    ABLATIONS,
    ALL_CASCADES,
    CASCADES,
    DIRECT,
    DISTILLED,
    NATIVES,
    OWN,
    TOKEN,
    Gallery,
    Settings,
    as_picture,
)

ATTENTION_TILE = 8 * TOKEN


def measures(
    pictures: torch.Tensor, base: torch.Tensor, requests: list[Request], retriever: Retriever, vae_stride: int
) -> dict[str, Any]:
    """The figures of one row."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    small = F.adaptive_avg_pool2d(pictures, base.shape[-1])
    pairs = [(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy()) for a, b in zip(small, base, strict=True)]
    psnr = [peak_signal_noise_ratio(b, a, data_range=1.0) for a, b in pairs]
    ssim = [structural_similarity(b, a, channel_axis=2, data_range=1.0) for a, b in pairs]
    score = evaluate(retriever, requests, pictures)
    return {
        "psnr": float(np.median(psnr)),
        "ssim": float(np.median(ssim)),
        "seam_tokens": float(np.median([seam_ratio(p, TOKEN) for p in pictures])),
        "seam_attention_tiles": float(np.median([seam_ratio(p, ATTENTION_TILE) for p in pictures])),
        "seam_vae_tiles": float(np.median([seam_ratio(p, vae_stride) for p in pictures])),
        "emoji": score.emoji,
        "background": score.background,
        "both": score.both,
    }


def vae_memory(pipe: Any, sides: list[int]) -> list[dict[str, Any]]:
    """Peak bytes of the CPU allocator while the VAE decodes and encodes squares, in tiles and whole."""

    def peak(work: Callable[[], Any]) -> int:
        with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
            work()
        events = profile.profiler.kineto_results.events()
        return int(np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"]).max())

    found = []
    for side in sides:
        latents = torch.randn(1, pipe.vae.config.latent_channels, side // 4, side // 4)
        pixels = torch.randn(1, 3, side, side)
        row: dict[str, Any] = {"pixels": side}
        for name in ("whole", "tiles"):
            with tiled(pipe.vae) if name == "tiles" else contextlib.nullcontext():
                row[f"decode_{name}"] = peak(lambda latents=latents: pipe.vae.decode(latents))
                row[f"encode_{name}"] = peak(lambda pixels=pixels: pipe.vae.encode(pixels))
        found.append(row)
    return found


def table(rows: list[dict[str, Any]], memory: list[dict[str, Any]], pictures: int, native: int, right: float) -> str:
    """All of it in Markdown; right: share of the images of ``native`` px that show what was asked for."""
    lines = [
        f"PSNR and SSIM (median of {pictures}) of the result, averaged down to {native} px, to the dense image of "
        f"{native} px with the same prompt and seed, which the cascades begin with and the others never see; of those "
        f"{100 * right:.0f} % show what was asked for. Seam: mean step between pixels across borders over that elsewhere, 1 "
        "is none; at borders of tokens, of the attention's tiles and of the VAE's. Retrieval as in retrieval.md.",
        "",
        "| px | drawn by | PSNR, dB | SSIM | seam: tokens | attention tiles | VAE tiles | emoji | background | both |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seams = " | ".join(f"{row[f'seam_{name}']:.2f}" for name in ("tokens", "attention_tiles", "vae_tiles"))
        shares = " | ".join(f"{100 * row[name]:.0f} %" for name in ("emoji", "background", "both"))
        lines.append(f"| {row['pixels']} | {row['row']} | {row['psnr']:.1f} | {row['ssim']:.3f} | {seams} | {shares} |")
    lines += [
        "",
        "Peak memory of the VAE, MB:",
        "",
        "| px | decode, whole | decode, tiles | encode, whole | encode, tiles |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in memory:
        cells = " | ".join(
            f"{row[f'{way}_{name}'] / 1e6:.0f}" for way in ("decode", "encode") for name in ("whole", "tiles")
        )
        lines.append(f"| {row['pixels']} | {cells} |")
    return "\n".join(lines) + "\n"


def main(
    chosen: Annotated[
        list[str] | None,
        typer.Option("--row", help="Draw only these rows into --folder, and write no results; repeat."),
    ] = None,
    ablations: Annotated[
        list[str] | None,
        typer.Option("--ablation", help="One more row, a cascade with one setting changed; repeat, or 'all' of them."),
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Images per row.")] = 32,
    shown: Annotated[int, typer.Option(min=1, help="Prompts on the contact sheet.")] = 4,
    native: Annotated[int, typer.Option(help=f"Side in pixels to begin with: {' or '.join(map(str, NATIVES))}.")] = 256,
    sizes: Annotated[str, typer.Option(help="Sides in pixels, doublings of the native one.")] = "512",
    r: Annotated[int, typer.Option(help="Window radius in tokens of 8 px.")] = 8,
    weights: Annotated[
        str, typer.Option(help=f"Under windows: {DISTILLED!r} for them, or the model's {OWN!r}.")
    ] = DISTILLED,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the dense image and of the direct rows.")] = 16,
    ntk_factor: Annotated[
        float, typer.Option(help="Of the direct rows: on the base of the rotary frequencies.")
    ] = 10.0,
    memory: Annotated[str, typer.Option(help="Sides at which the VAE's memory is measured.")] = "256,512,1024,2048",
    seed: Annotated[int, typer.Option(help="Chooses the prompts and the noise.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    folder: Annotated[Path | None, typer.Option(help="Keep what the rows draw here, and reuse what is there.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Draw, measure, and write JSON, Markdown and a contact sheet."""
    torch.set_num_threads(threads)
    sides = [int(side) for side in sizes.split(",")]
    if weights not in (OWN, DISTILLED):
        raise typer.BadParameter(f"--weights must be {OWN!r} or {DISTILLED!r}, got {weights!r}")
    if native not in NATIVES:
        raise typer.BadParameter(f"--native must be one of {list(NATIVES)}, got {native}")
    for option, given, known in (
        ("--row", chosen, (*DIRECT, *ALL_CASCADES)),
        ("--ablation", ablations, ("all", *ABLATIONS)),
    ):
        if unknown := [name for name in given or () if name not in known]:
            raise typer.BadParameter(f"{option}: unknown {', '.join(unknown)}; known are {'; '.join(known)}")
    if chosen and folder is None:
        raise typer.BadParameter("--row draws into --folder; name one")
    added = ABLATIONS if "all" in (ablations or ()) else ablations or ()
    names = chosen or [*DIRECT, *CASCADES, *added]
    settings = Settings(native, r, weights, steps, ntk_factor)
    vocabulary = read_vocabulary(embedded.model_directory())
    drawings = read_reference_sheet(embedded.model_directory(), len(vocabulary.emoji))
    retriever = Retriever(drawings, list(vocabulary.backgrounds.values()))
    pipe = embedded.pipeline(device=device)
    pipe.set_progress_bar_config(disable=True)
    requests = trained_requests(vocabulary, max(pictures, shown), seed)
    vae_stride = int(tile_size(pipe.vae) * (1 - OVERLAP))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    sheet: dict[int, list[torch.Tensor]] = {pixels: [] for pixels in sides}
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns))
        place = folder if folder is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        task = progress.add_task("base", total=len(requests) * (1 + len(sides) * len(names)))
        gallery = Gallery(
            place, pipe, vocabulary, requests, settings, sides, lambda count: progress.advance(task, count)
        )
        base = gallery.base()
        right = evaluate(retriever, requests, base).both
        for name in names:
            progress.update(task, description=name)
            rows += gallery.measured(name, lambda drawn: measures(drawn, base, requests, retriever, vae_stride))
            if not chosen and name not in ABLATIONS:
                for pixels, drawn in gallery.row(name).items():
                    sheet[pixels].append(drawn)
        stages = {name: gallery.stage(name) for name in names if name in CASCADES}
    if chosen:
        return
    used = vae_memory(embedded.pipeline(), [int(side) for side in memory.split(",")])
    about = facts(
        torch.device(device),
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
        pictures=len(requests),
        seed=seed,
        right=right,
        teacher=teacher_fingerprint(),
        students=students_fingerprint(),
        **asdict(settings),
        **stages,
    )
    text = table(sorted(rows, key=lambda row: row["pixels"]), used, len(requests), native, right)
    write_results("highres", about, [*rows, *used], text, out)
    backgrounds = list(vocabulary.backgrounds)
    labels = [caption(vocabulary.emoji[item.emoji].name, backgrounds[item.background]) for item in requests[:shown]]
    contact_sheet(
        [[as_picture(drawn[i]) for drawn in (base, *sheet[pixels])] for pixels in sides for i in range(shown)],
        [f"{pixels} px: {label}" for pixels in sides for label in labels],
        [f"dense, {native} px", *(name.replace(" + ", "\n+ ", 1) for name in (*DIRECT, *CASCADES))],
        cell=256,
    ).save(out / "highres.png")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
