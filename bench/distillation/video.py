"""Distil windows into a small video model: what a window alone takes from it, and what training gives back.

Run ``python -m bench.distillation.video``; some minutes on two CPU cores. A small Wan transformer learns to denoise clips of a
disc that moves, all of it made here; then each window is put on it, measured, distilled by ``flexclear.distill``, and measured
again, on clips that neither has seen. Writes ``bench/results/distillation-video.json`` and ``.md``, which
``docs/distilling-videos.md`` shows. What it says is how the loop behaves, not what a window does to a model of billions.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import flexclear
from flexclear.common.foreign import without_bars
from flexclear.distill import DistillConfig, MemorySamples, OptimizerConfig, Sample, distill
from flexclear.distill.batches import Batch, BatchMaker, held_out_batches
from flexclear.distill.calls import TRAINED_TIMES, wan_call
from flexclear.distill.config import CheckpointConfig, LoraConfig, LossConfig, TimestepConfig
from flexclear.masks import Layout, Window, all_frames, ball, cost, cylinder, radial

from bench.machine import RESULTS, facts, write_results

FRAMES, SIDE, CHANNELS, TEXT = 6, 16, 4, 16
"""Latents ``[4, 6, 16, 16]``, 6 x 8 x 8 tokens, and channels of text."""

COLOURS, WAYS = 6, 8

EULER = 12
"""Steps in which a clip is drawn."""

WINDOWS: dict[str, Window] = {
    "cylinder(3, 1)": cylinder(3, 1),
    "all_frames(3)": all_frames(3),
    "ball(4, 2)": ball(4, 2),
    "radial(4)": radial(4),
}

FIRST = next(iter(WINDOWS))
"""The window that is distilled into a LoRA as well."""


def tiny_wan(seed: int) -> Any:
    """A WanTransformer3DModel of 3 blocks, 4 heads x 16."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=128,
        num_layers=3,
    )


def clips(count: int, seed: int) -> MemorySamples:
    """Clips of a disc that moves over a slope; its colour and its way are in the text."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(COLOURS + WAYS, TEXT, generator=torch.Generator().manual_seed(0))
    colours = torch.randn(COLOURS, CHANNELS, generator=torch.Generator().manual_seed(1))
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    samples = []
    for number in range(count):
        colour, way = (int(torch.randint(most, (1,), generator=generator)) for most in (COLOURS, WAYS))
        start, (slope_y, slope_x) = SIDE * torch.rand(2, generator=generator), torch.randn(2, generator=generator)
        angle = 2 * math.pi * way / WAYS
        frames = []
        for frame in range(FRAMES):
            y, x = start[0] + 2.5 * frame * math.sin(angle), start[1] + 2.5 * frame * math.cos(angle)
            dy, dx = ((axis - at + SIDE / 2) % SIDE - SIDE / 2 for axis, at in ((rows, y), (columns, x)))
            disc = torch.sigmoid(3 * (3.5 - (dy.square() + dx.square()).sqrt()))
            slope = 0.5 * (slope_y * (rows / SIDE - 0.5) + slope_x * (columns / SIDE - 0.5))
            frames.append(colours[colour].view(-1, 1, 1) * disc + slope)
        mean = torch.stack(frames, dim=1)
        samples.append(Sample(mean, torch.full_like(mean, -30), words[[colour, COLOURS + way]], caption=str(number)))
    return MemorySamples(samples)


def batches(samples: MemorySamples, size: int, seed: int) -> Iterator[Batch]:
    maker = BatchMaker(samples, range(len(samples)), size, seed, TimestepConfig("logit_normal"), drawn=False)
    number = 0
    while True:
        yield maker.make(number)
        number += 1


def train_teacher(model: Any, samples: MemorySamples, steps: int, seed: int) -> float:
    """Flow matching with all weights; returns the mean loss of the last hundred steps."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    losses = []
    for _, batch in zip(range(steps), batches(samples, 8, seed), strict=False):
        loss = F.mse_loss(model(**wan_call(model, batch, 0.0))[0], batch.noise - batch.latents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-100:]) / len(losses[-100:])


@torch.no_grad()
def predictions(model: Any, held_out: list[Batch]) -> Tensor:
    """What the model predicts of clips that training did not see, at noise levels from 0 to 1."""
    return torch.cat([model(**wan_call(model, batch, 0.0))[0] for batch in held_out])


@torch.no_grad()
def drawn(model: Any, held_out: list[Batch]) -> Tensor:
    """Clips that the model draws of the held-out texts, by Euler's method."""
    found = []
    for batch in held_out:
        latents = batch.noise
        levels = torch.linspace(1, 0, EULER + 1)
        for level, following in itertools.pairwise(levels):
            times = torch.full((len(latents),), float(level) * TRAINED_TIMES)
            velocity = model(latents, times, batch.prompt_embeds, return_dict=False)[0]
            latents = latents + (following - level) * velocity
        found.append(latents)
    return torch.cat(found)


def relative(found: Tensor, right: Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def config_of(output: Path, kind: str, steps: int, seed: int) -> DistillConfig:
    return DistillConfig(
        output=output,
        backend="sdpa",
        train=kind,
        lora=LoraConfig(8, 8),
        steps=steps,
        batch_size=4,
        gradient_accumulation=1,
        mixed_precision="no",
        device="cpu",
        latents="mean",
        seed=seed,
        # Without the flow loss: this teacher is not done with learning, and a student would go on past it.
        losses=LossConfig(flow=0.0, attention_every=1),
        optimizer=OptimizerConfig("adamw", learning_rate=1e-3, schedule="cosine", warmup_steps=steps // 20),
        timesteps=TimestepConfig("logit_normal"),
        checkpoints=CheckpointConfig(every=steps),
    )


@without_bars
def main(
    teacher_steps: Annotated[int, typer.Option(min=1, help="Training steps of the teacher.")] = 600,
    steps: Annotated[int, typer.Option(min=1, help="Distillation steps of each student.")] = 150,
    training_clips: Annotated[int, typer.Option(min=4, help="Clips that are trained on.")] = 512,
    unseen_clips: Annotated[int, typer.Option(min=1, help="Clips that are measured on.")] = 32,
    seed: Annotated[int, typer.Option(help="Of weights, clips and noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Train the teacher, distil every window into it, and write what came of it."""
    training, unseen = clips(training_clips, seed), clips(unseen_clips, seed + 1000)
    held_out = held_out_batches(unseen, range(len(unseen)), 16, seed, drawn=False)
    teacher = tiny_wan(seed)
    begin = time.perf_counter()
    loss = train_teacher(teacher, training, teacher_steps, seed)
    typer.echo(f"teacher: loss {loss:.3f} after {time.perf_counter() - begin:.0f} s")
    right, pictures = predictions(teacher, held_out), drawn(teacher, held_out)
    layout, rows = Layout(SIDE // 2, SIDE // 2, 0, frames=FRAMES), []
    with tempfile.TemporaryDirectory() as folder:
        for name, window in WINDOWS.items():
            for kind in ("projections", "lora") if name == FIRST else ("projections",):
                student = flexclear.transform(copy.deepcopy(teacher), r=window, backend="sdpa")
                before = relative(predictions(student, held_out), right), relative(drawn(student, held_out), pictures)
                begin = time.perf_counter()
                run = distill(student, config_of(Path(folder) / f"{name}-{kind}", kind, steps, seed), training)
                seconds = time.perf_counter() - begin
                after = relative(predictions(student, held_out), right), relative(drawn(student, held_out), pictures)
                row = {
                    "window": name,
                    "trained": kind,
                    "density": cost(layout, window).density,
                    "prediction": [before[0], after[0]],
                    "clip": [before[1], after[1]],
                    "losses": [run.losses[0]["loss"], run.losses[-1]["loss"]],
                    "seconds": seconds,
                }
                rows.append(row)
                typer.echo(str(row))
    about = facts(torch.device("cpu"), teacher_steps=teacher_steps, steps=steps, seed=seed, teacher_loss=round(loss, 4))
    write_results("distillation-video", about, rows, table(rows), out)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| window | pairs | trained | error of the prediction, before / after | of a drawn clip, before / after |",
        "|---|---:|---|---:|---:|",
    ]
    for row in rows:
        prediction, clip = (f"{before:.3f} / {after:.3f}" for before, after in (row["prediction"], row["clip"]))
        lines.append(f"| {row['window']} | {row['density']:.1%} | {row['trained']} | {prediction} | {clip} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
