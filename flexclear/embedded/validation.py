"""Images with known correct answers, to check the retriever itself before it judges a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from flexclear.embedded.evaluation import Request
from flexclear.embedded.scenes import draw, random_scene
from flexclear.embedded.vocabulary import Vocabulary

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def clean_pictures(
    vocabulary: Vocabulary, bitmaps: Sequence[Image.Image], count: int, seed: int, pixels: int = 128
) -> tuple[torch.Tensor, list[Request]]:
    """Return seeded clean drawings, shape (count, 3, pixels, pixels), values 0 to 1, and what each shows."""
    chooser = random.Random(seed)
    colours = list(vocabulary.backgrounds.values())
    requests = [Request(number % len(bitmaps), chooser.randrange(len(colours)), seed) for number in range(count)]
    drawn = [
        torch.from_numpy(draw(random_scene(r.emoji, r.background, chooser), bitmaps, colours, pixels).copy())
        for r in requests
    ]
    return torch.stack(drawn).permute(0, 3, 1, 2).float() / 255, requests


@torch.no_grad()
def vae_round_trip(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Return images, values 0 to 1, after encoding and decoding them with the autoencoder."""
    decoded = []
    for part in pictures.split(batch):
        latents = vae.encode((part * 2 - 1).to(vae.dtype)).latent_dist.mode()
        decoded.append((vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(decoded)
