"""What the model says it knows."""

from __future__ import annotations

import pytest

from flexclear import embedded
from flexclear.embedded.captions import FULL_TEMPLATES, all_captions, caption, split_words
from flexclear.embedded.vocabulary import Vocabulary, read_vocabulary


def test_names():
    names = embedded.emoji_names()
    assert len(names) == len(set(names)) >= 64
    assert "red apple" in names
    backgrounds = embedded.background_names()
    assert len(backgrounds) == len(set(backgrounds)) >= 8
    assert "blue" in backgrounds


def test_about_one_pair_in_ten_is_held_out():
    pairs = embedded.held_out_pairs()
    every = len(embedded.emoji_names()) * len(embedded.background_names())
    assert 0.08 <= len(set(pairs)) / every <= 0.12
    assert {emoji for emoji, _ in pairs} <= set(embedded.emoji_names())
    assert {background for _, background in pairs} == set(embedded.background_names())


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("", []),
        ("a red apple on a blue background", []),
        ("A RED Apple, Blue background.", []),
        ("a zebra on a turquoise background", ["zebra", "turquoise"]),
        ("Zebra and zebra", ["Zebra", "and", "zebra"]),
        ("zebra zebra", ["zebra"]),
        ("red-apple", []),
    ],
)
def test_unknown_words(prompt, unknown):
    assert embedded.unknown_words(prompt) == unknown


def test_every_training_caption_is_known():
    for text in all_captions(embedded.emoji_names(), embedded.background_names()):
        assert embedded.unknown_words(text) == []


def test_captions():
    assert caption("red apple", "blue") == "a red apple on a blue background"
    assert caption("octopus", "pink") == "an octopus on a pink background"
    assert all("{" not in caption("bus", "red", template) for template in FULL_TEMPLATES)
    assert split_words("A bus, on Red!") == ["A", "bus", "on", "Red"]


def test_vocabulary_survives_its_file(vocabulary, tmp_path):
    (tmp_path / "vocabulary.json").write_text(vocabulary.to_json(), encoding="utf-8")
    assert read_vocabulary(tmp_path) == vocabulary
    assert isinstance(vocabulary, Vocabulary)


def test_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocabulary\.json"):
        read_vocabulary(tmp_path)
