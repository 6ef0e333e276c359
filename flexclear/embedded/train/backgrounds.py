"""Backgrounds that no caption names: any color, or one of the emoji's own.

Meant for pairs that the model never saw and draws too faintly, such as a yellow trumpet on yellow. Used in the last few
thousand steps, they did not fix those (RECORD.md). They have not been tried from the start of training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from flexclear.embedded.scenes import UNNAMED, Colour, Pair, Scene

OWN_SHARE = 0.7
"""Share of these backgrounds whose color lies between the emoji's mean and one of its pixels."""
OWN_SPREAD = 16
"""Largest difference from that colour, per channel, of 255."""
KEPT_AWAY = 64.0
"""Minimum RGB distance, 255 per channel, between a background and the named color of its emoji's held-out pair."""
TRIES = 200


def unname(
    scenes: Sequence[Scene],
    share: float,
    bitmaps: Sequence[Image.Image],
    colours: Sequence[Colour],
    held_out: Sequence[Pair],
    seed: int,
) -> list[Scene]:
    """Return the scenes, about ``share`` of them with an unnamed background color.

    A color nearer than ``KEPT_AWAY`` to one that forms a held-out pair with the emoji is never used, so the pair stays unseen,
    both in words and visually.

    Args:
        scenes: scenes with named backgrounds.
        share: 0 to 1.
        bitmaps: one RGBA image per emoji index.
        colours: the named colors, RGB from 0 to 255.
        held_out: pairs of emoji and named background.
        seed: determines the scenes and the colors.

    Raises:
        ValueError: the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of backgrounds without a name must lie between 0 and 1, got {share}")
    generator = random.Random(seed)
    pixels = [_opaque(bitmap) for bitmap in bitmaps]
    hidden: dict[int, list[Colour]] = {}
    for emoji, background in held_out:
        hidden.setdefault(emoji, []).append(colours[background])
    changed = []
    for scene in scenes:
        if generator.random() < share:
            colour = _colour(pixels[scene.emoji], hidden.get(scene.emoji, []), generator)
            scene = replace(scene, background=UNNAMED, colour=colour)
        changed.append(scene)
    return changed


def _opaque(bitmap: Image.Image) -> np.ndarray:
    values = np.asarray(bitmap.convert("RGBA")).reshape(-1, 4)
    return values[values[:, 3] > 200, :3]


def _colour(own: np.ndarray, avoided: Sequence[Colour], generator: random.Random) -> Colour:
    for _ in range(TRIES):
        if len(own) and generator.random() < OWN_SHARE:
            mean, pixel = own.mean(0), own[generator.randrange(len(own))]
            near = mean + generator.random() * (pixel - mean)
            spread = [generator.randint(-OWN_SPREAD, OWN_SPREAD) for _ in range(3)]
            red, green, blue = (max(0, min(255, round(float(n) + s))) for n, s in zip(near, spread, strict=True))
        else:
            red, green, blue = (generator.randrange(256) for _ in range(3))
        colour = (red, green, blue)
        if all(math.dist(colour, other) >= KEPT_AWAY for other in avoided):
            return colour
    raise ValueError(f"no background colour found in {TRIES} tries that keeps away from {list(avoided)}")
