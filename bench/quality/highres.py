"""The embedded model at 2 and 4 times its training size: directly, and enlarged stage by stage.

The cascades are what ``upscale_cascade`` draws where nothing is set: the released settings of each method.

Run ``python -m bench.quality.highres`` (needs ``pip install -e '.[eval]'``); it writes ``highres.json``, ``highres.md`` and
``highres.png`` into ``bench/results``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import typer
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import flexclear
from flexclear import embedded
from flexclear.embedded.captions import caption
from flexclear.embedded.evaluation import Request, evaluate, generate, trained_requests
from flexclear.embedded.reference import read_reference_sheet
from flexclear.embedded.retrieval import Retriever
from flexclear.embedded.students import as_student, read_students
from flexclear.embedded.vocabulary import Vocabulary, read_vocabulary
from flexclear.highres import Stage, seam_ratio, tiled, upscale_cascade
from flexclear.highres.tiling import OVERLAP, tile_size
from flexclear.images.sheet import contact_sheet

from bench.machine import RESULTS, facts, write_results

NATIVE = 128
TOKEN = 8
TEXT = 32
ATTENTION_TILE = 8 * TOKEN


@dataclass(frozen=True)
class Settings:
    """How everything is drawn, except what the cascades' stages choose by themselves; see ``main``."""

    r: int
    weights: str
    steps: int
    ntk_factor: float


DIRECT: dict[str, tuple[bool, bool, bool]] = {
    "dense": (False, False, False),
    "CLEAR": (True, False, False),
    "CLEAR + NTK": (True, True, False),
    "CLEAR + NTK + proportional": (True, True, True),
}
"""Rows that draw at the larger size at once: windows, NTK factor, proportional attention."""
OWN, DISTILLED = "own", "distilled"
CASCADES = {"SDEdit": "sdedit", "I-Max": "imax"}


@contextlib.contextmanager
def windowed(pipe: Any, settings: Settings) -> Iterator[None]:
    """Inside the block the pipeline has windows, and the weights that were distilled for them if those are wanted.

    Raises:
        ValueError: no weights for this radius ship.
    """
    if settings.weights == OWN:
        flexclear.transform(pipe, r=settings.r)
        try:
            yield
        finally:
            flexclear.restore(pipe)
        return
    discs = {student.radius: student for student in read_students() if student.down_factor is None}
    if settings.r not in discs:
        raise ValueError(f"weights for r = {sorted(discs)} ship, not for {settings.r}; or --weights {OWN}")
    with as_student(pipe, discs[settings.r]):
        yield


def direct(
    pipe: Any,
    vocabulary: Vocabulary,
    requests: list[Request],
    pixels: int,
    row: str,
    settings: Settings,
    done: Callable,
) -> torch.Tensor:
    """Pictures ``[n, 3, pixels, pixels]``, 0 to 1, of a row of ``DIRECT``."""
    windows, ntk, proportional = DIRECT[row]
    with contextlib.ExitStack() as stack:
        if windows:
            stack.enter_context(windowed(pipe, settings))
            stack.enter_context(
                flexclear.override(
                    ntk_factor=settings.ntk_factor if ntk else 1.0,
                    proportional_attention=proportional,
                    training_tokens=(NATIVE // TOKEN) ** 2 + TEXT,
                )
            )
        return generate(pipe, vocabulary, requests, settings.steps, pixels, 4, TEXT, done)


def cascaded(
    pipe: Any,
    vocabulary: Vocabulary,
    requests: list[Request],
    largest: int,
    row: str,
    settings: Settings,
    done: Callable,
    base: torch.Tensor,
) -> tuple[dict[int, torch.Tensor], Stage]:
    """The same of a row of ``CASCADES``, by side: the dense pictures ``base`` doubled under windows until ``largest``.

    Nothing is set but the text length, which the embedded model needs. Also a stage, for the settings that it chose.
    """
    sizes = [2 * NATIVE]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    backgrounds = list(vocabulary.backgrounds)
    drawn: list[tuple[torch.Tensor, ...]] = []
    with windowed(pipe, settings):
        for request, picture in zip(requests, base, strict=True):
            cascade = upscale_cascade(
                pipe,
                caption(vocabulary.emoji[request.emoji].name, backgrounds[request.background]),
                sizes,
                method=CASCADES[row],
                image=as_picture(picture),
                seed=request.seed,
                max_sequence_length=TEXT,
            )
            drawn.append(tuple(as_tensor(image) for image in cascade.images))
            done(len(sizes))
    return dict(zip(sizes, map(torch.stack, zip(*drawn, strict=True)), strict=True)), cascade.stages[-1]


def stage_settings(stage: Stage) -> str:
    """What the enlarging stages ran with, in words."""
    strength = "" if stage.strength is None else f"strength {stage.strength:g}, "
    proportional = ", proportional attention" if stage.proportional_attention else ""
    return f"({stage.steps} steps, {strength}shift {stage.shift:g}, NTK factor {stage.ntk_factor:g}{proportional})"


def as_tensor(picture: Image.Image) -> torch.Tensor:
    """``[3, height, width]``, 0 to 1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255


def as_picture(picture: torch.Tensor) -> Image.Image:
    """Back."""
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())


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


def table(rows: list[dict[str, Any]], memory: list[dict[str, Any]], pictures: int) -> str:
    """All of it in Markdown."""
    lines = [
        f"PSNR and SSIM (median of {pictures}) of the result, averaged down to {NATIVE} px, to the dense picture of "
        f"{NATIVE} px with the same prompt and seed, which the cascades begin with and the others never see. Seam: mean "
        "step between pixels across borders over that elsewhere, 1 is none; at borders of tokens, of the attention's tiles "
        "and of the VAE's. Retrieval as in retrieval.md.",
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
    pictures: Annotated[int, typer.Option(min=1, help="Pictures per row.")] = 32,
    shown: Annotated[int, typer.Option(min=1, help="Prompts on the contact sheet.")] = 3,
    sizes: Annotated[str, typer.Option(help="Sides in pixels, doublings of 128.")] = "256,512",
    r: Annotated[int, typer.Option(help="Window radius in tokens of 8 px.")] = 8,
    weights: Annotated[
        str, typer.Option(help=f"Under windows: {DISTILLED!r} for them, or the model's {OWN!r}.")
    ] = DISTILLED,
    steps: Annotated[
        int, typer.Option(min=1, help="Denoising steps of the dense picture and of the direct rows.")
    ] = 16,
    ntk_factor: Annotated[
        float, typer.Option(help="Of the direct rows: on the base of the rotary frequencies.")
    ] = 10.0,
    memory: Annotated[str, typer.Option(help="Sides at which the VAE's memory is measured.")] = "256,512,1024,2048",
    seed: Annotated[int, typer.Option(help="Chooses the prompts and the noise.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Draw, measure, and write JSON, Markdown and a contact sheet."""
    torch.set_num_threads(threads)
    sides = [int(side) for side in sizes.split(",")]
    if weights not in (OWN, DISTILLED):
        raise typer.BadParameter(f"--weights must be {OWN!r} or {DISTILLED!r}, got {weights!r}")
    settings = Settings(r, weights, steps, ntk_factor)
    vocabulary = read_vocabulary(embedded.model_directory())
    drawings = read_reference_sheet(embedded.model_directory(), len(vocabulary.emoji))
    retriever = Retriever(drawings, list(vocabulary.backgrounds.values()))
    pipe = embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    requests = trained_requests(vocabulary, max(pictures, shown), seed)
    vae_stride = int(tile_size(pipe.vae) * (1 - OVERLAP))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    stages: dict[str, str] = {}
    sheet: dict[int, list[torch.Tensor]] = {}
    with Progress(*columns) as progress:
        task = progress.add_task("base", total=len(requests) * (1 + len(sides) * (len(DIRECT) + len(CASCADES))))

        def done(count: int) -> None:
            progress.advance(task, count)

        base = generate(pipe, vocabulary, requests, steps, NATIVE, max_sequence_length=TEXT, on_done=done)
        enlarged = {}
        for row in CASCADES:
            progress.update(task, description=row)
            enlarged[row], stage = cascaded(pipe, vocabulary, requests, max(sides), row, settings, done, base)
            stages[row] = stage_settings(stage)
        for pixels in sides:
            sheet[pixels] = [base]
            for row in (*DIRECT, *CASCADES):
                progress.update(task, description=f"{pixels} px, {row}")
                if row in DIRECT:
                    drawn = direct(pipe, vocabulary, requests, pixels, row, settings, done)
                else:
                    drawn = enlarged[row][pixels]
                rows.append({"pixels": pixels, "row": row, **measures(drawn, base, requests, retriever, vae_stride)})
                sheet[pixels].append(drawn)
    used = vae_memory(pipe, [int(side) for side in memory.split(",")])
    about = facts(
        torch.device("cpu"),
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
        pictures=len(requests),
        seed=seed,
        **asdict(settings),
        **stages,
    )
    write_results("highres", about, [*rows, *used], table(rows, used, len(requests)), out)
    backgrounds = list(vocabulary.backgrounds)
    labels = [caption(vocabulary.emoji[item.emoji].name, backgrounds[item.background]) for item in requests[:shown]]
    contact_sheet(
        [[as_picture(drawn[i]) for drawn in sheet[pixels]] for pixels in sides for i in range(shown)],
        [f"{pixels} px: {label}" for pixels in sides for label in labels],
        [f"dense, {NATIVE} px", *(name.replace(" + ", "\n+ ", 1) for name in (*DIRECT, *CASCADES))],
        cell=256,
    ).save(out / "highres.png")
    typer.echo(table(rows, used, len(requests)))


if __name__ == "__main__":
    typer.run(main)
