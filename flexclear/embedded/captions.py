"""The captions the embedded model was trained on, and the words in them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

EMPTY_SHARE = 0.05
"""Share of training images whose caption is empty."""
BARE_SHARE = 0.08
"""Share of training images whose caption names the emoji but not the background."""
FULL_STOP_SHARE = 0.1
"""Share of the other captions that end with a full stop."""

FULL_TEMPLATES = (
    "{a_emoji} on {a_background} background",
    "{a_emoji} on {a_background} background",
    "{emoji} on {a_background} background",
    "{a_emoji} on {background}",
    "{emoji} on {background}",
    "{background} background with {a_emoji}",
    "{a_background} background with {a_emoji}",
    "{emoji}, {background} background",
    "an emoji of {a_emoji} on {a_background} background",
    "{emoji} emoji on {a_background} background",
)
"""Caption patterns that name both parts; the first is listed twice, so that it is drawn twice as often."""
BARE_TEMPLATES = ("{emoji}", "{a_emoji}", "an emoji of {a_emoji}")

_WORD = re.compile(r"[^\W_]+")


def with_article(words: str) -> str:
    """Return ``words`` after "a" or "an", by its first letter."""
    return f"{'an' if words[:1] in tuple('aeiou') else 'a'} {words}"


def caption(emoji: str, background: str, template: str = FULL_TEMPLATES[0]) -> str:
    """Return the caption that a template gives for an emoji name and a background name."""
    return template.format(
        emoji=emoji,
        background=background,
        a_emoji=with_article(emoji),
        a_background=with_article(background),
    )


def random_caption(emoji: str, background: str | None, generator: random.Random) -> str:
    """Return a training caption: empty, the emoji alone, or both parts in a random pattern; never both without a background."""
    draw = generator.random()
    if draw < EMPTY_SHARE:
        return ""
    bare = background is None or draw < EMPTY_SHARE + BARE_SHARE
    text = caption(emoji, background or "", generator.choice(BARE_TEMPLATES if bare else FULL_TEMPLATES))
    return text + "." if generator.random() < FULL_STOP_SHARE else text


def all_captions(emoji: Iterable[str], backgrounds: Iterable[str]) -> list[str]:
    """Return every caption that any template gives, without duplicates, in a fixed order."""
    names = list(backgrounds)
    texts = [
        caption(name, background, template)
        for name in emoji
        for background in names
        for template in FULL_TEMPLATES + BARE_TEMPLATES
    ]
    return list(dict.fromkeys(texts))


def split_words(text: str) -> list[str]:
    """Return the words of a text as they are written, in order, without punctuation."""
    return _WORD.findall(text)
