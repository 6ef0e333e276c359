"""Show more often what the model still gets wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexclear.embedded.evaluation import Request, generate, trained_requests
from flexclear.embedded.retrieval import Match, Retriever
from flexclear.embedded.vocabulary import Vocabulary

if TYPE_CHECKING:
    from diffusers import FluxPipeline

EMPHASIS_NAME = "emphasis.json"


def measure_emphasis(
    pipeline: FluxPipeline, retriever: Retriever, vocabulary: Vocabulary, pictures: int, strength: float, seed: int
) -> dict[str, float]:
    """Return how often to show each emoji: 1 where every picture of it is right, 1 + ``strength`` where none is.

    Args:
        pipeline: the model so far.
        retriever: finds the nearest clean drawing.
        vocabulary: the emoji and backgrounds.
        pictures: pictures to draw, spread evenly over the emoji; at least one each.
        strength: what an emoji that is never right gains.
        seed: chooses backgrounds and noise; not the seed that the results are measured with.
    """
    if pictures < len(vocabulary.emoji):
        raise ValueError(f"need a picture per emoji, {len(vocabulary.emoji)} or more, got {pictures}")
    requests = trained_requests(vocabulary, pictures, seed)
    matches = retriever.match(generate(pipeline, vocabulary, requests, steps=12))
    return weigh(vocabulary, requests, matches, strength)


def weigh(
    vocabulary: Vocabulary, requests: Sequence[Request], matches: Sequence[Match], strength: float
) -> dict[str, float]:
    """Return 1 + ``strength`` times the share of wrong pictures, for each emoji by name."""
    drawn = Counter(request.emoji for request in requests)
    wrong = Counter(r.emoji for r, match in zip(requests, matches, strict=True) if r.emoji != match.emoji)
    return {
        item.name: 1.0 + strength * wrong[index] / max(1, drawn[index]) for index, item in enumerate(vocabulary.emoji)
    }


def write_emphasis(folder: Path, weights: dict[str, float]) -> Path:
    """Write the weights to ``folder`` and return the file."""
    path = folder / EMPHASIS_NAME
    path.write_text(json.dumps(weights, indent=1) + "\n")
    return path


def read_emphasis(folder: Path, names: Sequence[str]) -> list[float] | None:
    """Return the weight of each name, or None where ``folder`` holds none.

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
