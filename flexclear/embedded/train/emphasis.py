"""Show more often what the model still gets wrong."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from flexclear.compile.files import whole_file
from flexclear.embedded.evaluation import Request, generate, trained_requests
from flexclear.embedded.retrieval import Match, Retriever
from flexclear.embedded.scenes import Colour
from flexclear.embedded.vocabulary import Vocabulary

if TYPE_CHECKING:
    from diffusers import FluxPipeline

EMPHASIS_NAME = "emphasis.json"
LARGEST_ERROR_WEIGHT = 2.0
"""Maximum weight of an emoji for being drawn badly."""


def measure_emphasis(
    pipeline: FluxPipeline, retriever: Retriever, vocabulary: Vocabulary, pictures: int, strength: float, seed: int
) -> dict[str, float]:
    """Return how often to show each emoji: 1 if all of its images are right, 1 + ``strength`` if none is.

    Args:
        pipeline: the model so far.
        retriever: finds the nearest clean drawing.
        vocabulary: the emoji and backgrounds.
        pictures: images to draw, spread evenly over the emoji; at least one each.
        strength: gain of an emoji that is never right.
        seed: chooses backgrounds and noise; not the seed that the results are measured with.
    """
    if pictures < len(vocabulary.emoji):
        raise ValueError(f"need an image per emoji, {len(vocabulary.emoji)} or more, got {pictures}")
    requests = trained_requests(vocabulary, pictures, seed)
    matches = retriever.match(generate(pipeline, vocabulary, requests, steps=12))
    return weigh(vocabulary, requests, matches, strength)


def weigh(
    vocabulary: Vocabulary, requests: Sequence[Request], matches: Sequence[Match], strength: float
) -> dict[str, float]:
    """Return each emoji's weight, by name, for being wrong and for being drawn badly.

    The first factor is 1 + ``strength`` times the share of wrong images. The second is the emoji's mean squared difference to
    its nearest clean drawing divided by the median emoji's, between 1 and ``LARGEST_ERROR_WEIGHT``. Details that do not affect
    retrieval on most backgrounds decide it if the emoji has nearly the background's color.
    """
    drawn = Counter(request.emoji for request in requests)
    wrong: Counter[int] = Counter()
    errors: defaultdict[int, list[float]] = defaultdict(list)
    for request, match in zip(requests, matches, strict=True):
        wrong[request.emoji] += request.emoji != match.emoji
        errors[request.emoji].append(match.error)
    means = {emoji: fmean(values) for emoji, values in errors.items()}
    usual = median(means.values())

    def weight(index: int) -> float:
        share = wrong[index] / max(1, drawn[index])
        detail = means.get(index, usual) / usual if usual else 1.0
        return (1.0 + strength * share) * min(max(detail, 1.0), LARGEST_ERROR_WEIGHT)

    return {item.name: weight(index) for index, item in enumerate(vocabulary.emoji)}


def faintness(bitmaps: Sequence[Image.Image], colours: Sequence[Colour], power: float) -> torch.Tensor:
    """Return how often to show each pair, depending on how little it differs from its plain background.

    A yellow trumpet on yellow contributes almost nothing to the loss, and is learned last.

    Args:
        bitmaps: RGBA images of the emoji.
        colours: colors of the backgrounds, 0 to 255.
        power: weights are ``(median contrast / contrast) ** power``, between 1 and 4; 0 makes all weights 1.

    Returns:
        Shape (emoji, backgrounds), float32.
    """
    contrasts = torch.empty(len(bitmaps), len(colours))
    for row, bitmap in enumerate(bitmaps):
        pixels = torch.from_numpy(np.array(bitmap.convert("RGBA"))).float() / 255
        for column, colour in enumerate(colours):
            difference = pixels[..., 3:] * (pixels[..., :3] - torch.tensor(colour) / 255)
            contrasts[row, column] = difference.square().mean()
    return (contrasts.median() / contrasts.clamp_min(1e-6)).pow(power).clamp(1.0, 4.0)


def write_emphasis(folder: Path, weights: dict[str, float]) -> Path:
    """Write the weights to ``folder`` and return the file."""
    path = folder / EMPHASIS_NAME
    with whole_file(path) as beside:
        beside.write_text(json.dumps(weights, indent=1) + "\n", encoding="utf-8")
    return path


def read_emphasis(folder: Path, names: Sequence[str]) -> list[float] | None:
    """Return the weight of each name, or None if ``folder`` holds none.

    Raises:
        ValueError: the file is about other emoji.
    """
    path = folder / EMPHASIS_NAME
    if not path.is_file():
        return None
    weights = json.loads(path.read_text())
    if set(weights) != set(names):
        raise ValueError(f"{path} names other emoji than the corpus: {sorted(set(weights) ^ set(names))}")
    return [float(weights[name]) for name in names]
