"""The demo: the embedded pipeline draws the same prompts and seeds, dense and under several windows."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flexclear.compile.files import whole_file
from flexclear.convert import restore, transform
from flexclear.embedded.evaluation import picture_psnr
from flexclear.embedded.students import Student, as_student
from flexclear.images.sheet import contact_sheet
from flexclear.masks import Cost, Disc, Downsampled, Layout, cost

TEXT_TOKENS = 64
"""Text length of the demo. The pipeline's own default, 512, gives the same quality but is slower."""


@dataclass(frozen=True)
class Variant:
    """One column of the sheet.

    Attributes:
        radius: window radius in tokens, None for dense attention.
        pictures: one per prompt.
        cost: cost of one attention layer; None for dense attention.
        seconds_per_step: median over all steps except each image's first, in which a variant may compile.
        psnr: mean PSNR in dB to the dense images with the same seeds; None for dense attention.
        student: student whose weights were distilled for the window; None: the dense model's weights.
    """

    radius: int | None
    pictures: list[Image.Image]
    cost: Cost | None
    seconds_per_step: float
    psnr: float | None
    student: Student | None = None

    @property
    def label(self) -> str:
        if self.student is not None:
            return self.student.label
        return "dense" if self.radius is None else f"r = {self.radius}"


def mean_psnr(pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Mean peak signal-to-noise ratio in dB of pairs of images of one size."""

    def stacked(group: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(np.array(p.convert("RGB"))).float() / 255 for p in group])

    return picture_psnr(stacked(pictures), stacked(others)).mean().item()


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seed: int,
    steps: int,
    side: int,
    on_step: Callable[[], None],
) -> tuple[list[Image.Image], float]:
    """Draw one image per prompt with seeds ``seed``, ``seed + 1``, ...; return them and the median seconds per step."""
    pictures, durations = [], []
    for index, prompt in enumerate(prompts):
        ends: list[float] = []

        def step_end(pipe: Any, step: int, timestep: Any, tensors: dict, ends: list[float] = ends) -> dict:
            ends.append(time.perf_counter())
            on_step()
            return tensors

        pictures += pipe(
            prompt,
            height=side,
            width=side,
            num_inference_steps=steps,
            max_sequence_length=TEXT_TOKENS,
            generator=torch.Generator().manual_seed(seed + index),
            callback_on_step_end=step_end,
        ).images
        durations += [b - a for a, b in itertools.pairwise(ends)]
    return pictures, statistics.median(durations)


def run_variants(
    pipe: Any,
    prompts: Sequence[str],
    radii: Sequence[int],
    *,
    seed: int,
    steps: int,
    side: int,
    students: Sequence[Student] = (),
    on_step: Callable[[str], None] = lambda label: None,
) -> list[Variant]:
    """Draw every prompt dense, under every radius, and with every student; restore the pipeline afterwards.

    Args:
        pipe: the embedded pipeline, not transformed.
        prompts: what to draw.
        radii: window radii in tokens.
        seed: seed of the first prompt's noise; the next prompt uses the next seed.
        steps: denoising steps, 2 or more.
        side: image side in pixels.
        students: drawn after the radii, next to the dense weights under the same window if ``radii`` has its radius.
        on_step: called with the variant's label after each step.
    """
    factor = 2 * pipe.vae_scale_factor
    layout = Layout(side // factor, side // factor, TEXT_TOKENS)
    config = pipe.transformer.config
    channels = config.num_attention_heads * config.attention_head_dim
    dense, pace = draw(pipe, prompts, seed, steps, side, lambda: on_step("dense"))
    variants = [Variant(None, dense, None, pace, None)]
    for radius in radii:
        transform(pipe, r=radius)
        try:
            pictures, pace = draw(pipe, prompts, seed, steps, side, lambda radius=radius: on_step(f"r = {radius}"))  # type: ignore[misc]
        finally:
            restore(pipe)
        spent = cost(layout, Disc(radius), channels=channels)
        psnr = mean_psnr(pictures, dense)
        variants.append(Variant(radius, pictures, spent, pace, psnr))
    for student in students:
        with as_student(pipe, student):
            pictures, pace = draw(
                pipe, prompts, seed, steps, side, lambda student=student: on_step(student.label)  # type: ignore[misc]
            )  # fmt: skip
        disc = Disc(student.radius)
        window = disc if student.down_factor is None else Downsampled(disc, student.down_factor)
        spent = cost(layout, window, channels=channels)
        variants.append(Variant(student.radius, pictures, spent, pace, mean_psnr(pictures, dense), student))
    return variants


def markdown_table(variants: Sequence[Variant]) -> str:
    """Format the variants as a Markdown table."""
    lines = [
        "| window radius | density | executed / useful work | PSNR to dense, dB | seconds per step |",
        "|---|---|---|---|---|",
    ]
    for v in variants:
        if v.cost is None:
            lines.append(f"| dense | 100 % | 1.00 | | {v.seconds_per_step:.3f} |")
        else:
            window = v.radius if v.student is None else v.student.label.removeprefix("r = ")
            lines.append(
                f"| {window} | {100 * v.cost.density:.1f} % | {v.cost.amplification:.2f} | {v.psnr:.1f} | "
                f"{v.seconds_per_step:.3f} |"
            )
    return "\n".join(lines) + "\n"


def write(variants: Sequence[Variant], prompts: Sequence[str], out: Path) -> tuple[Path, Path]:
    """Write ``contact_sheet.png`` and ``table.md`` into the folder ``out``, made if missing; return both paths."""
    labels = [v.label if v.psnr is None else f"{v.label.replace(', ', chr(10))}\n{v.psnr:.1f} dB" for v in variants]
    rows = [list(row) for row in zip(*(v.pictures for v in variants), strict=True)]
    picture, table = out / "contact_sheet.png", out / "table.md"
    with whole_file(picture) as beside:
        contact_sheet(rows, prompts, labels).save(beside, format="PNG")
    with whole_file(table) as beside:
        beside.write_text(markdown_table(variants), encoding="utf-8")
    return picture, table
