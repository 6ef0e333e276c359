"""The pieces of the training that need no training."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from flexclear import embedded
from flexclear.embedded.captions import random_caption
from flexclear.embedded.font import EmojiFontError, extract_bitmaps
from flexclear.embedded.scenes import EMOJI_SIZES, SCENE_PIXELS, SHIFTS, draw, random_scene, scale_bitmap, still_scene
from flexclear.embedded.train import corpus
from flexclear.embedded.train.checkpoint import load_checkpoint, save_checkpoint
from flexclear.embedded.train.export import trained_vocabulary
from flexclear.embedded.train.pictures import training_pairs, training_scenes
from flexclear.embedded.train.tokenizers import kept_clip_tokenizer


def test_shipped_vocabulary_is_the_corpus(vocabulary):
    assert vocabulary == trained_vocabulary()


def test_held_out_pairs_are_never_drawn():
    held_out = corpus.held_out_pairs()
    pairs = training_pairs(64, 8, held_out)
    assert len(pairs) == 64 * 8 - len(held_out)
    shown = {(scene.emoji, scene.background) for scene in training_scenes(pairs, 2000, seed=0)}
    assert shown == set(pairs)
    assert not shown & set(held_out)


def test_scenes_stay_inside_and_differ():
    generator = random.Random(0)
    scenes = [random_scene(0, 0, generator) for _ in range(200)]
    assert all(0 <= s.left <= SCENE_PIXELS - s.size and 0 <= s.top <= SCENE_PIXELS - s.size for s in scenes)
    assert {scene.size for scene in scenes} == set(EMOJI_SIZES)
    assert len({(scene.left, scene.size) for scene in scenes}) == len(SHIFTS) * len(EMOJI_SIZES)
    assert {scene.flipped for scene in scenes} == {False, True}


def test_a_still_scene_is_always_the_same():
    assert still_scene(3, 2) == still_scene(3, 2)
    shown = training_scenes(training_pairs(4, 2, []), 24, seed=0, still=True)
    assert set(shown) == {still_scene(emoji, background) for emoji in range(4) for background in range(2)}


def test_a_scene_drawn_larger_is_the_same_scene():
    bitmap = Image.new("RGBA", (136, 128), (200, 10, 10, 255))
    scene = random_scene(0, 0, random.Random(1))
    small = draw(scene, [bitmap], [(0, 0, 255)])
    large = draw(scene, [bitmap], [(0, 0, 255)], pixels=256)
    assert small.shape == (128, 128, 3)
    assert large.shape == (256, 256, 3)
    halved = large.reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(halved - small).mean() < 3
    with pytest.raises(ValueError, match="multiple of 128"):
        draw(scene, [bitmap], [(0, 0, 255)], pixels=100)


def test_scaled_bitmaps_fit_and_mirror():
    bitmap = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
    bitmap.paste((255, 0, 0, 255), (0, 0, 40, 128))
    plain, mirrored = np.asarray(scale_bitmap(bitmap, 64)), np.asarray(scale_bitmap(bitmap, 64, flipped=True))
    assert plain.shape == (64, 64, 4)
    assert plain[32, 5, 3] > 200 > mirrored[32, 5, 3]
    with pytest.raises(ValueError, match="at least 1 pixel"):
        scale_bitmap(bitmap, 0)


def test_captions_are_varied_and_known():
    generator = random.Random(0)
    texts = [random_caption("red apple", "blue", generator) for _ in range(500)]
    assert 5 <= texts.count("") <= 60
    assert len(set(texts)) > 10
    assert all(embedded.unknown_words(text) == [] for text in texts)


def test_missing_font_says_how_to_install_it(tmp_path):
    with pytest.raises(EmojiFontError, match="fonts-noto-color-emoji"):
        extract_bitmaps([0x1F34E], tmp_path / "none.ttf")


def test_checkpoints_are_whole(tmp_path):
    path = tmp_path / "some" / "state.pt"
    with pytest.raises(FileNotFoundError, match="earlier training step"):
        load_checkpoint(path)
    save_checkpoint(path, {"step": 3})
    save_checkpoint(path, {"step": 4})
    assert load_checkpoint(path) == {"step": 4}
    assert [item.name for item in path.parent.iterdir()] == ["state.pt"]


def test_a_run_that_is_resumed_keeps_the_first_tokenizer(tmp_path):
    captions = ["a red apple on a blue background", "an ear of corn", "an image of an eye at night"]
    file = tmp_path / "folder" / "clip_tokenizer.json"
    first = kept_clip_tokenizer(file, captions)
    again = kept_clip_tokenizer(file, ["other captions are not read any more"])
    assert first.get_vocab() == again.get_vocab()
    for caption in captions:
        assert first(caption).input_ids == again(caption).input_ids
        assert len(again(caption).input_ids) == len(caption.split()) + 2
