"""Draw many seeded training scenes into one array."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image
from rich.progress import track

from flexclear.embedded.scenes import Colour, Pair, Scene, draw, random_scene, still_scene


def training_pairs(emoji_count: int, background_count: int, held_out: Sequence[Pair]) -> list[Pair]:
    """Return every (emoji, background) pair that is not held out, in order."""
    hidden = set(held_out)
    pairs = ((emoji, background) for emoji in range(emoji_count) for background in range(background_count))
    return [pair for pair in pairs if pair not in hidden]


def training_scenes(pairs: Sequence[Pair], count: int, seed: int, still: bool = False) -> list[Scene]:
    """Return ``count`` scenes, jittered or still, that visit the pairs equally often, in a seeded order."""
    generator = random.Random(seed)
    scenes: list[Scene] = []
    for pair in _rounds(pairs, count, generator):
        scenes.append(still_scene(*pair) if still else random_scene(*pair, generator))
    return scenes


def _rounds(pairs: Sequence[Pair], count: int, generator: random.Random) -> Iterator[Pair]:
    left = count
    while left > 0:
        shuffled = list(pairs)
        generator.shuffle(shuffled)
        yield from shuffled[:left]
        left -= len(shuffled)


def draw_all(
    scenes: Sequence[Scene], bitmaps: Sequence[Image.Image], colours: Sequence[Colour], pixels: int
) -> np.ndarray:
    """Return the scenes drawn, shape (scenes, pixels, pixels, 3), dtype uint8."""
    drawn = np.empty((len(scenes), pixels, pixels, 3), dtype=np.uint8)
    for index, scene in enumerate(track(scenes, description=f"drawing {pixels} px")):
        drawn[index] = draw(scene, bitmaps, colours, pixels)
    return drawn
