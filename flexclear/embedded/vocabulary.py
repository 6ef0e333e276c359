"""What the embedded model knows: its emoji, its backgrounds, its words, and the pairs it never saw."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flexclear.common.shipped import model_directory
from flexclear.embedded.captions import split_words
from flexclear.embedded.scenes import Colour, Emoji

FILE_NAME = "vocabulary.json"


@dataclass(frozen=True)
class Vocabulary:
    """The contents of a model folder's vocabulary.json.

    Attributes:
        emoji: the emoji in training order.
        backgrounds: background names with their RGB colours, 0 to 255, in training order.
        words: every lower-case word that occurred in a training caption.
        held_out_pairs: (emoji name, background name) pairs that no training image showed.
    """

    emoji: tuple[Emoji, ...]
    backgrounds: dict[str, Colour]
    words: frozenset[str]
    held_out_pairs: tuple[tuple[str, str], ...]

    def to_json(self) -> str:
        """Return the text of vocabulary.json."""
        content = {
            "emoji": [{"name": item.name, "code_point": item.code_point} for item in self.emoji],
            "backgrounds": {name: list(colour) for name, colour in self.backgrounds.items()},
            "words": sorted(self.words),
            "held_out_pairs": [list(pair) for pair in self.held_out_pairs],
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


@cache
def read_vocabulary(folder: Path) -> Vocabulary:
    """Read a model folder's vocabulary.

    Raises:
        FileNotFoundError: the folder holds no vocabulary.json.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so the embedded model is not installed completely")
    content = json.loads(path.read_text(encoding="utf-8"))
    return Vocabulary(
        emoji=tuple(Emoji(item["name"], item["code_point"]) for item in content["emoji"]),
        backgrounds={name: (red, green, blue) for name, (red, green, blue) in content["backgrounds"].items()},
        words=frozenset(content["words"]),
        held_out_pairs=tuple((emoji, background) for emoji, background in content["held_out_pairs"]),
    )


def emoji_names() -> list[str]:
    """Return the names of the emoji that the embedded model can draw, such as "red apple"."""
    return [item.name for item in read_vocabulary(model_directory()).emoji]


def background_names() -> list[str]:
    """Return the names of the background colours that the embedded model can draw, such as "blue"."""
    return list(read_vocabulary(model_directory()).backgrounds)


def held_out_pairs() -> list[tuple[str, str]]:
    """Return the (emoji name, background name) pairs that no training image showed."""
    return list(read_vocabulary(model_directory()).held_out_pairs)


def unknown_words(prompt: str) -> list[str]:
    """Return the words of a prompt that never occurred in a training caption.

    They come as written in the prompt, in order, each spelling once; case and punctuation do not matter. An empty list means
    that every word is known, not that the model has seen their combination.
    """
    known = read_vocabulary(model_directory()).words
    return [word for word in dict.fromkeys(split_words(prompt)) if word.lower() not in known]
