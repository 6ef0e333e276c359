"""Draw a scene: one emoji, at one place, on one flat background colour."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image

SCENE_PIXELS = 128
"""Side of the base canvas. Positions and sizes of a scene are in its pixels, whatever size is drawn."""
EMOJI_SIZES = {96: 0.3, 104: 0.7}
"""Sides of the square that an emoji is scaled into, and how often each is drawn."""
SMALLEST_EMOJI, LARGEST_EMOJI = min(EMOJI_SIZES), max(EMOJI_SIZES)
SHIFTS = {-8: 0.25, 0: 0.5, 8: 0.25}
"""Offsets of an emoji from the canvas center, whole tokens, and how often each is drawn."""
FLIPPED_SHARE = 0.3
"""Share of mirrored images."""

Colour: TypeAlias = tuple[int, int, int]
Pair: TypeAlias = tuple[int, int]

UNNAMED = -1
"""Background index of a scene whose background color has no name in captions."""


@dataclass(frozen=True)
class Emoji:
    """One emoji: its lower-cased Unicode name and its code point."""

    name: str
    code_point: int


@dataclass(frozen=True)
class Scene:
    """Everything that determines an image. Lengths are in pixels of the 128-pixel base canvas.

    Attributes:
        emoji: index of the emoji.
        background: index of the background colour, or ``UNNAMED``.
        size: side of the square that the emoji's bitmap is scaled into.
        left: x of that square's left edge.
        top: y of that square's top edge.
        flipped: whether the emoji is mirrored left to right.
        colour: color of an unnamed background; None if ``background`` determines it.
    """

    emoji: int
    background: int
    size: int
    left: int
    top: int
    flipped: bool
    colour: Colour | None = None


def still_scene(emoji: int, background: int) -> Scene:
    """Return the scene of this emoji on this background without jitter: largest, in the middle, not mirrored."""
    middle = (SCENE_PIXELS - LARGEST_EMOJI) // 2
    return Scene(emoji, background, LARGEST_EMOJI, middle, middle, flipped=False)


def random_scene(emoji: int, background: int, generator: random.Random) -> Scene:
    """Return a scene of this emoji on this background; ``generator`` draws size, place and mirroring."""

    def drawn(choices: dict[int, float]) -> int:
        return generator.choices(list(choices), list(choices.values()))[0]

    size = drawn(EMOJI_SIZES)
    middle = (SCENE_PIXELS - size) // 2
    return Scene(
        emoji=emoji,
        background=background,
        size=size,
        left=middle + drawn(SHIFTS),
        top=middle,
        flipped=generator.random() < FLIPPED_SHARE,
    )


def scale_bitmap(bitmap: Image.Image, size: int, flipped: bool = False) -> Image.Image:
    """Return the bitmap scaled into a transparent ``size`` x ``size`` RGBA square, maybe mirrored."""
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    factor = size / max(bitmap.size)
    width, height = (max(1, round(side * factor)) for side in bitmap.size)
    premultiplied = bitmap.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    if flipped:
        premultiplied = premultiplied.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    square = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    square.paste(premultiplied, ((size - width) // 2, (size - height) // 2))
    return square


def draw(
    scene: Scene, bitmaps: Sequence[Image.Image], colours: Sequence[Colour], pixels: int = SCENE_PIXELS
) -> np.ndarray:
    """Return the scene as an array of shape (pixels, pixels, 3), dtype uint8.

    Args:
        scene: what to draw; its lengths are scaled by ``pixels / 128``.
        bitmaps: one RGBA image per emoji index.
        colours: one RGB triple (0 to 255) per background index.
        pixels: side of the drawn image, a multiple of 128.

    Raises:
        ValueError: ``pixels`` is not a positive multiple of 128.
    """
    if pixels < SCENE_PIXELS or pixels % SCENE_PIXELS:
        raise ValueError(f"pixels must be a positive multiple of {SCENE_PIXELS}, got {pixels}")
    factor = pixels // SCENE_PIXELS
    colour = colours[scene.background] if scene.colour is None else scene.colour
    canvas = Image.new("RGB", (pixels, pixels), colour)
    square = scale_bitmap(bitmaps[scene.emoji], scene.size * factor, scene.flipped)
    canvas.paste(square, (scene.left * factor, scene.top * factor), square)
    return np.asarray(canvas)
