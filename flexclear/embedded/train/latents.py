"""Encode the training images once, and keep their latents in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.progress import track

from flexclear.embedded.scenes import Colour, Scene, draw
from flexclear.embedded.train.checkpoint import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class LatentSet:
    """Normalized latents of jittered scenes, and what each shows.

    Attributes:
        latents: shape (images, 8, side, side), dtype float16, mean about 0 and deviation about 1.
        emoji: shape (images,), int64 emoji indices.
        backgrounds: shape (images,), int64 background indices, which may include ``UNNAMED``.
    """

    latents: torch.Tensor
    emoji: torch.Tensor
    backgrounds: torch.Tensor


@dataclass(frozen=True)
class LatentCache:
    """The training latents at 128 and 256 pixels, with the shift and scaling that normalized them."""

    small: LatentSet
    large: LatentSet
    shift: float
    scaling: float


def build_cache(
    vae: AutoencoderKL,
    scenes: tuple[Sequence[Scene], Sequence[Scene]],
    bitmaps: Sequence[Image.Image],
    colours: Sequence[Colour],
    path: Path,
    shift_and_scaling: tuple[float, float] | None = None,
) -> LatentCache:
    """Return the cached latents from ``path`` if they exist; else draw, encode and save them.

    Args:
        vae: the encoder.
        scenes: scenes of the 128-pixel and of the 256-pixel images.
        bitmaps: one RGBA image per emoji index.
        colours: one color per background index.
        path: the cache file.
        shift_and_scaling: normalization of the latents; without it they get mean 0 and deviation 1.

    Raises:
        ValueError: the latents at ``path`` are normalized differently.
    """
    if path.is_file():
        kept = _from_state(load_checkpoint(path))
        if shift_and_scaling not in (None, (kept.shift, kept.scaling)):
            raise ValueError(
                f"{path} is normalized by {(kept.shift, kept.scaling)}, the run expects {shift_and_scaling}: delete the file"
            )
        return kept
    vae = vae.eval()
    raw = [_encode(vae, part, bitmaps, colours, pixels) for part, pixels in zip(scenes, (128, 256), strict=True)]
    if shift_and_scaling is None:
        sample = raw[0].latents[:4096].float()
        shift, scaling = sample.mean().item(), 1 / sample.std().item()
    else:
        shift, scaling = shift_and_scaling
    state: dict[str, Any] = {"shift": shift, "scaling": scaling}
    for name, part in zip(("small", "large"), raw, strict=True):
        normalized = torch.empty_like(part.latents)
        for chunk, target in zip(part.latents.split(512), normalized.split(512), strict=True):
            target.copy_((chunk.float() - shift) * scaling)
        state[name] = {"latents": normalized, "emoji": part.emoji, "backgrounds": part.backgrounds}
    save_checkpoint(path, state)
    return _from_state(state)


def _from_state(state: dict[str, Any]) -> LatentCache:
    return LatentCache(LatentSet(**state["small"]), LatentSet(**state["large"]), state["shift"], state["scaling"])


@torch.no_grad()
def _encode(
    vae: AutoencoderKL,
    scenes: Sequence[Scene],
    bitmaps: Sequence[Image.Image],
    colours: Sequence[Colour],
    pixels: int,
) -> LatentSet:
    batch = 32 * 128 * 128 // (pixels * pixels)
    encoded = torch.empty(len(scenes), 8, pixels // 4, pixels // 4, dtype=torch.float16)
    for start in track(range(0, len(scenes), batch), description=f"encoding {pixels} px"):
        part = scenes[start : start + batch]
        drawn = torch.stack([torch.from_numpy(draw(s, bitmaps, colours, pixels).copy()) for s in part])
        pictures = (drawn.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        encoded[start : start + len(part)] = vae.encode(pictures).latent_dist.mode().to(torch.float16)
    return LatentSet(
        encoded,
        torch.tensor([scene.emoji for scene in scenes]),
        torch.tensor([scene.background for scene in scenes]),
    )
