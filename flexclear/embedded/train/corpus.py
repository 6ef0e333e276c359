"""What the embedded model learns: emoji, background colors, and the pairs that it never sees."""

from __future__ import annotations

import random
import unicodedata

from flexclear.embedded.scenes import Emoji, Pair

HELD_OUT_SEED = 20
HELD_OUT_PER_EMOJI_IN_TEN = 8

EMOJI_CODE_POINTS = (
    # food and drink
    0x1F34E, 0x1F34C, 0x1F34D, 0x1F347, 0x1F349, 0x1F353, 0x1F34B, 0x1F955,
    0x1F966, 0x1F951, 0x1F346, 0x1F354, 0x1F369, 0x1F368, 0x1F382, 0x1F36D,
    # plants, weather and sky
    0x1F344, 0x1F335, 0x1F33B, 0x1F339, 0x1F334, 0x1F384, 0x1F341, 0x1F308,
    0x1F30B, 0x1F525, 0x1F319, 0x1FA90,
    # travel and places
    0x1F680, 0x1F681, 0x1F68C, 0x1F692, 0x1F69C, 0x1F6B2, 0x1F3F0, 0x1F3AA,
    # things
    0x1F388, 0x1F381, 0x1F3C6, 0x1F3B8, 0x1F3BA, 0x1F3C8, 0x1F451, 0x1F3A9,
    0x1F511, 0x1F514, 0x1F4A3, 0x1F4F7, 0x1F4FA, 0x1F9F8, 0x1F47B, 0x1F480,
    # animals
    0x1F431, 0x1F43C, 0x1F98A, 0x1F438, 0x1F437, 0x1F427, 0x1F419, 0x1F980,
    0x1F98B, 0x1F41E, 0x1F420, 0x1F40C,
)  # fmt: skip

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 246),
    "gray": (122, 126, 132),
    "red": (176, 28, 44),
    "yellow": (252, 214, 84),
    "green": (46, 138, 72),
    "blue": (44, 96, 206),
    "purple": (108, 52, 150),
    "pink": (246, 164, 196),
}


def emoji() -> list[Emoji]:
    """Return the emoji in training order, each with its lower-cased Unicode name."""
    return [Emoji(unicodedata.name(chr(point)).lower(), point) for point in EMOJI_CODE_POINTS]


def held_out_pairs() -> list[Pair]:
    """Return the (emoji index, background index) pairs kept out of training: about one in ten, seeded.

    Every emoji loses at most one pair, and every background loses nearly the same number.
    """
    count = len(EMOJI_CODE_POINTS) * HELD_OUT_PER_EMOJI_IN_TEN // 10
    generator = random.Random(HELD_OUT_SEED)
    chosen = sorted(generator.sample(range(len(EMOJI_CODE_POINTS)), count))
    backgrounds = [index % len(BACKGROUNDS) for index in range(count)]
    generator.shuffle(backgrounds)
    return list(zip(chosen, backgrounds, strict=True))
