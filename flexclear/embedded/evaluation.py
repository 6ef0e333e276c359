"""Measure how often the pipeline draws what a prompt asks for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flexclear.embedded.captions import caption
from flexclear.embedded.retrieval import Match, Retriever
from flexclear.embedded.vocabulary import Vocabulary

if TYPE_CHECKING:
    from diffusers import FluxPipeline


@dataclass(frozen=True)
class Request:
    """One image to draw: which emoji on which background, by index, and the seed of its noise."""

    emoji: int
    background: int
    seed: int


@dataclass(frozen=True)
class Score:
    """Top-1 retrieval over a set of images.

    Attributes:
        pictures: how many images there were.
        emoji: share, 0 to 1, whose nearest clean drawing shows the requested emoji.
        background: share whose nearest background color is the requested one.
        both: share with both right.
        error: mean squared difference to the nearest clean drawing, averaged over the images.
    """

    pictures: int
    emoji: float
    background: float
    both: float
    error: float


def trained_requests(vocabulary: Vocabulary, count: int, seed: int) -> list[Request]:
    """Return ``count`` requests for pairs that were in training, spread evenly over the emoji."""
    hidden = set(_held_out_indices(vocabulary))
    chooser = random.Random(seed)
    requests = []
    for number in range(count):
        emoji = number % len(vocabulary.emoji)
        shown = [b for b in range(len(vocabulary.backgrounds)) if (emoji, b) not in hidden]
        requests.append(Request(emoji, chooser.choice(shown), seed * 1_000_000 + number))
    return requests


def held_out_requests(vocabulary: Vocabulary, repeats: int, seed: int) -> list[Request]:
    """Return ``repeats`` requests, with different noise, for every pair that was held out of training."""
    pairs = _held_out_indices(vocabulary) * repeats
    return [Request(e, b, seed * 1_000_000 + 500_000 + number) for number, (e, b) in enumerate(pairs)]


def _held_out_indices(vocabulary: Vocabulary) -> list[tuple[int, int]]:
    emoji = {item.name: index for index, item in enumerate(vocabulary.emoji)}
    backgrounds = {name: index for index, name in enumerate(vocabulary.backgrounds)}
    return [(emoji[e], backgrounds[b]) for e, b in vocabulary.held_out_pairs]


def generate(
    pipeline: FluxPipeline,
    vocabulary: Vocabulary,
    requests: Sequence[Request],
    steps: int,
    pixels: int = 128,
    batch: int = 16,
    max_sequence_length: int = 32,
    on_done: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Return the images that the pipeline draws for the requests.

    Args:
        pipeline: the pipeline to call.
        vocabulary: the names that the requests' indices stand for.
        requests: what to draw; each has its own noise, whatever the batch.
        steps: denoising steps.
        pixels: side of the images.
        batch: images drawn at once.
        max_sequence_length: T5 tokens, padding included.
        on_done: called with the number of images after each batch.

    Returns:
        Shape (requests, 3, pixels, pixels), values 0 to 1, float32, on the CPU.
    """
    backgrounds = list(vocabulary.backgrounds)
    drawn = []
    for start in range(0, len(requests), batch):
        part = requests[start : start + batch]
        output = pipeline(
            [caption(vocabulary.emoji[item.emoji].name, backgrounds[item.background]) for item in part],
            height=pixels,
            width=pixels,
            num_inference_steps=steps,
            max_sequence_length=max_sequence_length,
            generator=[torch.Generator().manual_seed(item.seed) for item in part],
            output_type="pt",
        )
        drawn.append(output.images.float().cpu())
        if on_done is not None:
            on_done(len(part))
    return torch.cat(drawn)


def score(requests: Sequence[Request], matches: Sequence[Match]) -> Score:
    """Return the top-1 shares of matches, one per request.

    Raises:
        ValueError: there are no requests, or not one match per request.
    """
    if not requests or len(requests) != len(matches):
        raise ValueError(f"need one match per request, got {len(requests)} and {len(matches)}")
    pairs = list(zip(requests, matches, strict=True))
    emoji = [request.emoji == match.emoji for request, match in pairs]
    background = [request.background == match.background for request, match in pairs]
    both = [e and b for e, b in zip(emoji, background, strict=True)]
    count = len(pairs)
    return Score(
        pictures=count,
        emoji=sum(emoji) / count,
        background=sum(background) / count,
        both=sum(both) / count,
        error=sum(match.error for match in matches) / count,
    )


def evaluate(retriever: Retriever, requests: Sequence[Request], pictures: torch.Tensor) -> Score:
    """Return the top-1 shares of images, shape (requests, 3, side, side), values 0 to 1."""
    return score(requests, retriever.match(pictures))


def picture_psnr(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the PSNR in dB of each image pair, shape (images,), of values 0 to 1; at most 120 dB."""
    if first.shape != second.shape:
        raise ValueError(f"images must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    error = (first - second).square().flatten(1).mean(1).clamp_min(1e-12)
    return -10 * error.log10()
