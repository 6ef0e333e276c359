"""Train the autoencoder: 128 px images to 32 x 32 latents of 8 channels and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flexclear.embedded.scenes import Colour, Pair
from flexclear.embedded.train.checkpoint import load_checkpoint, save_checkpoint
from flexclear.embedded.train.pictures import draw_all, training_scenes
from flexclear.embedded.train.schedule import Schedule
from flexclear.embedded.train.sheets import save_sheet

SAVE_EVERY = 200


@dataclass(frozen=True)
class VaeRecipe:
    """Settings of the autoencoder's training."""

    steps: int = 1400
    batch: int = 16
    crop_pixels: int = 64
    learning_rate: float = 2e-3
    squared_error_weight: float = 2.0
    divergence_weight: float = 2e-5
    small_pictures: int = 1600
    large_pictures: int = 300
    seed: int = 1


def build_vae() -> AutoencoderKL:
    """Return an untrained autoencoder of about 0.66 M parameters that scales sides down by 4."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def to_unit_range(pictures: np.ndarray) -> torch.Tensor:
    """Return uint8 images (count, height, width, 3) as floats (count, 3, height, width) of -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio, in dB, of two tensors with values of -1 to 1."""
    return 10 * math.log10(4 / max(F.mse_loss(first.float(), second.float()).item(), 1e-12))


def random_crops(pictures: np.ndarray, count: int, side: int, generator: np.random.Generator) -> np.ndarray:
    """Return seeded crops, shape (count, side, side, 3), from images (images, height, width, 3)."""
    chosen = generator.integers(len(pictures), size=count)
    tops = generator.integers(pictures.shape[1] - side + 1, size=count)
    lefts = generator.integers(pictures.shape[2] - side + 1, size=count)
    places = zip(chosen, tops, lefts, strict=True)
    return np.stack([pictures[i, y : y + side, x : x + side] for i, y, x in places])


def train_vae(
    recipe: VaeRecipe,
    pairs: Sequence[Pair],
    bitmaps: Sequence[Image.Image],
    colours: Sequence[Colour],
    folder: Path,
) -> AutoencoderKL:
    """Train, or resume from ``folder/vae.pt``, and return the autoencoder. Contact sheets also go into the folder."""
    torch.manual_seed(recipe.seed)
    model = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=1e-3)
    schedule = Schedule(40, recipe.steps // 3, recipe.steps)
    checkpoint_path = folder / "vae.pt"
    done = 0
    if checkpoint_path.is_file():
        state = load_checkpoint(checkpoint_path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    if schedule.finished(done):
        return model
    small = draw_all(training_scenes(pairs, recipe.small_pictures, recipe.seed), bitmaps, colours, 128)
    large = draw_all(training_scenes(pairs, recipe.large_pictures, recipe.seed + 1), bitmaps, colours, 256)
    check = to_unit_range(draw_all(training_scenes(pairs, 32, recipe.seed + 2), bitmaps, colours, 128))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("autoencoder", total=recipe.steps, completed=done)
        for step in range(done, recipe.steps):
            rate = recipe.learning_rate * schedule.factor(step)
            pictures = to_unit_range(_pictures_of_step(recipe, step, small, large))
            loss = _train_step(model, optimizer, pictures, rate, recipe)
            progress.update(task, advance=1, description=f"autoencoder loss {loss:.4f}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
                quality = _check(model, check, folder / "sheets" / "vae.png")
                progress.console.print(f"step {step + 1}: loss {loss:.4f}, {quality:.2f} dB", highlight=False)
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "psnr": quality,
                }
                save_checkpoint(checkpoint_path, state)
    return model


def _pictures_of_step(recipe: VaeRecipe, step: int, small: np.ndarray, large: np.ndarray) -> np.ndarray:
    generator = np.random.default_rng((recipe.seed, step))
    from_small = recipe.batch * 3 // 4
    return np.concatenate(
        [
            random_crops(small, from_small, recipe.crop_pixels, generator),
            random_crops(large, recipe.batch - from_small, recipe.crop_pixels, generator),
        ]
    )


def _train_step(
    model: AutoencoderKL,
    optimizer: torch.optim.Optimizer,
    pictures: torch.Tensor,
    learning_rate: float,
    recipe: VaeRecipe,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    posterior = model.encode(pictures).latent_dist
    decoded = model.decode(posterior.sample()).sample
    loss = F.l1_loss(decoded, pictures) + recipe.squared_error_weight * F.mse_loss(decoded, pictures)
    loss = loss + recipe.divergence_weight * posterior.kl().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _check(model: AutoencoderKL, pictures: torch.Tensor, sheet_path: Path) -> float:
    decoded = model.decode(model.encode(pictures).latent_dist.mode()).sample
    save_sheet(torch.cat([pictures[:16], decoded[:16]]), 8, sheet_path)
    return psnr(decoded.clamp(-1, 1), pictures)
