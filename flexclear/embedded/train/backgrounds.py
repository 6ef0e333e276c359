"""Backgrounds that no caption names, so that the model learns what an emoji is apart from what is behind it.

With eight colours a model can learn each pair by heart; what it was never shown, such as a yellow trumpet on yellow, it then
draws too faintly. Here some pictures get any colour, and some a colour of the emoji itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from flexclear.embedded.scenes import UNNAMED, Colour, Pair, Scene

OWN_SHARE = 0.5
"""Share of these backgrounds that have about the colour of one of the emoji's own pixels."""
OWN_SPREAD = 16
"""Largest difference from that pixel, per channel, of 255."""
TRIES = 200


def unname(
    scenes: Sequence[Scene],
    share: float,
    bitmaps: Sequence[Image.Image],
    colours: Sequence[Colour],
    held_out: Sequence[Pair],
    seed: int,
) -> list[Scene]:
    """Return the scenes, about ``share`` of them with a background colour that has no name.

    A colour whose nearest named one makes a held-out pair with the emoji is never taken: the pair stays unseen.

    Args:
        scenes: on named backgrounds.
        share: 0 to 1.
        bitmaps: one RGBA picture per emoji index.
        colours: the named ones, RGB of 0 to 255.
        held_out: pairs of emoji and named background.
        seed: of which scenes, and which colours.

    Raises:
        ValueError: the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of backgrounds without a name must lie between 0 and 1, got {share}")
    generator = random.Random(seed)
    pixels = [_opaque(bitmap) for bitmap in bitmaps]
    hidden: dict[int, set[int]] = {}
    for emoji, background in held_out:
        hidden.setdefault(emoji, set()).add(background)
    changed = []
    for scene in scenes:
        if generator.random() < share:
            avoided = hidden.get(scene.emoji, set())
            colour = _colour(pixels[scene.emoji], colours, avoided, generator)
            scene = replace(scene, background=UNNAMED, colour=colour)
        changed.append(scene)
    return changed


def nearest_colour(colour: Colour, colours: Sequence[Colour]) -> int:
    """Return the index of the named colour at the least squared distance, which retrieval takes a background for."""
    distances = [sum((a - b) ** 2 for a, b in zip(colour, named, strict=True)) for named in colours]
    return distances.index(min(distances))


def _opaque(bitmap: Image.Image) -> np.ndarray:
    values = np.asarray(bitmap.convert("RGBA")).reshape(-1, 4)
    return values[values[:, 3] > 200, :3]


def _colour(own: np.ndarray, colours: Sequence[Colour], avoided: set[int], generator: random.Random) -> Colour:
    for _ in range(TRIES):
        if len(own) and generator.random() < OWN_SHARE:
            red, green, blue = (int(value) for value in own[generator.randrange(len(own))])
            spread = [generator.randint(-OWN_SPREAD, OWN_SPREAD) for _ in range(3)]
            near = (red + spread[0], green + spread[1], blue + spread[2])
        else:
            near = (generator.randrange(256), generator.randrange(256), generator.randrange(256))
        colour = (_byte(near[0]), _byte(near[1]), _byte(near[2]))
        if nearest_colour(colour, colours) not in avoided:
            return colour
    raise ValueError(f"no background colour found in {TRIES} tries that keeps {sorted(avoided)} unseen")


def _byte(value: int) -> int:
    return max(0, min(255, value))
