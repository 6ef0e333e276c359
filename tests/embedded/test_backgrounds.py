"""Training images on backgrounds that no caption names, and runs that begin with an exported model."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flexclear import embedded
from flexclear.embedded.captions import random_caption
from flexclear.embedded.scenes import UNNAMED, draw, still_scene
from flexclear.embedded.train import corpus
from flexclear.embedded.train.assembly import assemble, begin_with, kept_normalization, load_trained
from flexclear.embedded.train.backgrounds import KEPT_AWAY, OWN_SHARE, OWN_SPREAD, unname
from flexclear.embedded.train.batches import BatchMaker
from flexclear.embedded.train.carried import MOST_BYTES, pack_run, unpack_run
from flexclear.embedded.train.checkpoint import load_checkpoint, save_checkpoint
from flexclear.embedded.train.latents import LatentCache, LatentSet, build_cache
from flexclear.embedded.train.pictures import training_pairs, training_scenes
from flexclear.embedded.train.transformer import CHECKPOINT_NAME, TransformerRecipe, train_transformer

COLOURS = list(corpus.BACKGROUNDS.values())
PAINTS = [(252, 214, 84), (46, 138, 72)]
"""A yellow and a green emoji."""
BITMAPS = [Image.new("RGBA", (8, 8), (*paint, 255)) for paint in PAINTS]
YELLOW, GREEN = (list(corpus.BACKGROUNDS).index(name) for name in ("yellow", "green"))


def unnamed_scenes(share: float, held_out, seed: int = 0, count: int = 400):
    pairs = training_pairs(2, len(COLOURS), held_out)
    return unname(training_scenes(pairs, count, seed), share, BITMAPS, COLOURS, held_out, seed)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), hidden=st.tuples(st.integers(0, 7), st.integers(0, 7)))
def test_no_colour_comes_near_a_held_out_pair(seed, hidden):
    held_out = [(0, hidden[0]), (1, hidden[1])]
    for scene in unnamed_scenes(1.0, held_out, seed, count=60):
        assert scene.background == UNNAMED
        assert math.dist(scene.colour, COLOURS[hidden[scene.emoji]]) >= KEPT_AWAY


def test_the_share_of_backgrounds_without_a_name():
    scenes = unnamed_scenes(0.4, [])
    unnamed = [scene for scene in scenes if scene.background == UNNAMED]
    assert 0.3 < len(unnamed) / len(scenes) < 0.5
    assert len({scene.colour for scene in unnamed}) > 0.9 * len(unnamed)
    assert all(scene.colour is None for scene in scenes if scene.background != UNNAMED)
    own = [s for s in unnamed if max(abs(a - b) for a, b in zip(s.colour, PAINTS[s.emoji], strict=True)) <= OWN_SPREAD]
    assert abs(len(own) / len(unnamed) - OWN_SHARE) < 0.15
    assert unnamed_scenes(0.0, []) == training_scenes(training_pairs(2, len(COLOURS), []), 400, 0)


def test_the_same_seed_gives_the_same_backgrounds():
    assert unnamed_scenes(0.5, [], seed=3) == unnamed_scenes(0.5, [], seed=3)
    assert unnamed_scenes(0.5, [], seed=3) != unnamed_scenes(0.5, [], seed=4)


def test_what_cannot_be_kept_unseen_is_an_error():
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        unnamed_scenes(1.5, [])
    everywhere = [(r, g, b) for r in range(0, 256, 51) for g in range(0, 256, 51) for b in range(0, 256, 51)]
    with pytest.raises(ValueError, match=r"no background colour found in 200 tries that keeps away from"):
        unname([still_scene(0, 0)], 1.0, BITMAPS, everywhere, [(0, b) for b in range(len(everywhere))], 0)


def test_an_emoji_lies_on_its_own_colours_unless_those_are_held_out():
    near = [s for s in unnamed_scenes(1.0, []) if math.dist(s.colour, PAINTS[s.emoji]) < KEPT_AWAY]
    assert {scene.emoji for scene in near} == {0, 1}
    left = unnamed_scenes(1.0, [(0, YELLOW)])
    assert not any(s.emoji == 0 and math.dist(s.colour, PAINTS[0]) < KEPT_AWAY for s in left)
    assert any(s.emoji == 1 and math.dist(s.colour, PAINTS[1]) < KEPT_AWAY for s in left)


def test_a_scene_is_drawn_on_its_own_colour():
    scene = replace(still_scene(0, YELLOW), background=UNNAMED, colour=(1, 2, 3))
    assert draw(scene, BITMAPS, COLOURS)[0, 0].tolist() == [1, 2, 3]
    assert draw(still_scene(0, YELLOW), BITMAPS, COLOURS)[0, 0].tolist() == list(COLOURS[YELLOW])


def test_captions_without_a_background_name_the_emoji_alone():
    texts = {random_caption("bell", None, random.Random(seed)) for seed in range(300)}
    assert texts <= {"", "bell", "a bell", "an emoji of a bell", "bell.", "a bell.", "an emoji of a bell."}
    assert len(texts) > 4


def test_pictures_without_a_name_have_captions_without_one_and_weigh_as_their_emoji(pipe):
    def half(side: int) -> LatentSet:
        backgrounds = torch.tensor([0, UNNAMED] * 10)
        return LatentSet(torch.randn(20, 8, side, side).half(), torch.arange(20) // 10, backgrounds)

    cache = LatentCache(half(32), half(64), 0.0, 1.0)

    def seen(weights: list[list[float]]) -> Counter[str]:
        maker = BatchMaker(
            cache, ["banana", "bell"], ["blue"], pipe.tokenizer, pipe.tokenizer_2, 1, torch.tensor(weights)
        )
        ids = [row for step in range(30) for row in maker.make(step).t5_ids]
        words = pipe.tokenizer_2.batch_decode(ids, skip_special_tokens=True)
        return Counter(f"{name} {'blue' in text}" for text in words for name in ("banana", "bell") if name in text)

    even = seen([[1.0], [1.0]])
    assert 0.4 < (even["bell True"] + even["banana True"]) / even.total() < 0.5, even
    favoured = seen([[1.0], [9.0]])
    assert favoured["bell False"] > 5 * favoured["banana False"]


def test_latents_keep_a_normalization_that_is_given(pipe, tmp_path):
    scenes = ([still_scene(0, YELLOW), still_scene(1, GREEN)], [still_scene(1, YELLOW)])
    own = build_cache(pipe.vae, scenes, BITMAPS, COLOURS, tmp_path / "own.pt")
    given_ = build_cache(pipe.vae, scenes, BITMAPS, COLOURS, tmp_path / "given.pt", (0.25, 2.0))
    assert own.small.latents.float().mean().abs() < 0.01
    assert abs(own.small.latents.float().std() - 1) < 0.01
    assert (given_.shift, given_.scaling) == (0.25, 2.0)
    raw = given_.small.latents.float() / 2 + 0.25
    torch.testing.assert_close(raw, own.small.latents.float() / own.scaling + own.shift, rtol=0.01, atol=0.01)
    again = build_cache(pipe.vae, scenes, BITMAPS, COLOURS, tmp_path / "given.pt")
    assert torch.equal(again.small.latents, given_.small.latents)
    with pytest.raises(
        ValueError, match=r"own\.pt is normalized by .*, the run expects \(0\.25, 2\.0\): delete the file"
    ):
        build_cache(pipe.vae, scenes, BITMAPS, COLOURS, tmp_path / "own.pt", (0.25, 2.0))
    same = (own.shift, own.scaling)
    assert build_cache(pipe.vae, scenes, BITMAPS, COLOURS, tmp_path / "own.pt", same).shift == own.shift


def test_a_run_can_begin_with_the_exported_model(pipe, tmp_path):
    folder = begin_with(embedded.model_directory(), tmp_path / "run")
    assert kept_normalization(folder) == (pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor)
    loaded = load_trained(folder)
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        ours, theirs = (getattr(p, name).state_dict() for p in (loaded, pipe))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    text = "a red apple on a blue background"
    for name in ("tokenizer", "tokenizer_2"):
        assert getattr(loaded, name)(text).input_ids == getattr(pipe, name)(text).input_ids
    assert isinstance(loaded, FluxPipeline)
    with pytest.raises(FileExistsError, match="holds a run already"):
        begin_with(embedded.model_directory(), folder)
    with pytest.raises(FileNotFoundError, match="no pipeline in"):
        begin_with(tmp_path, tmp_path / "other")
    assert not (tmp_path / "other" / CHECKPOINT_NAME).exists()


@pytest.mark.kept
def test_a_run_that_began_with_the_exported_model_is_gone_on_with(pipe, tmp_path):
    folder = begin_with(embedded.model_directory(), tmp_path)
    torch.manual_seed(0)
    kept = LatentSet(
        torch.randn(4, 8, 32, 32).half(), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, UNNAMED, UNNAMED])
    )
    cache = LatentCache(kept, kept, *kept_normalization(folder))
    recipe = TransformerRecipe(compiled=False, warmup=1)
    steps = []
    for total in (1, 2):
        pipeline, learners = assemble(folder, pipe.vae, cache.shift, cache.scaling, recipe.seed)
        maker = BatchMaker(cache, ["banana", "bell"], ["blue"], pipeline.tokenizer, pipeline.tokenizer_2, recipe.seed)
        done = train_transformer(recipe, learners, maker, pipeline, ["a bell"], folder, total, 0)
        steps.append((done, load_checkpoint(folder / CHECKPOINT_NAME)))
    assert [done for done, _ in steps] == [1, 2]
    weights = [pipe.transformer.state_dict()] + [state["learners"]["transformer"] for _, state in steps]
    name = "transformer_blocks.0.attn.to_q.weight"
    first, second = (after[name] - before[name] for before, after in itertools.pairwise(weights))
    assert 0 < first.abs().max() < 0.1 * weights[0][name].abs().max()  # The shipped weights, one step on.
    assert second.abs().max() > 0
    assert kept_normalization(folder) == (cache.shift, cache.scaling)

    packed = pack_run(folder, tmp_path / "carried" / "run.pt")
    assert packed.stat().st_size <= MOST_BYTES
    elsewhere = unpack_run(packed, embedded.model_directory(), tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="holds a run already"):
        unpack_run(packed, embedded.model_directory(), elsewhere)
    ours, theirs = (load_checkpoint(place / CHECKPOINT_NAME) for place in (folder, elsewhere))
    assert [theirs[key] for key in ("step", "schedule")] == [ours[key] for key in ("step", "schedule")]
    for part, weights in ours["learners"].items():
        for key, tensor in weights.items():
            assert theirs["learners"][part][key].dtype == tensor.dtype
            # bfloat16 keeps eight bits of a significand.
            torch.testing.assert_close(theirs["learners"][part][key], tensor, rtol=2**-8, atol=1e-38)
    (muon, _), (same, gone) = ours["optimizer"], theirs["optimizer"]
    assert gone is None
    assert same["state"].keys() == muon["state"].keys() != set()
    for number, kept in muon["state"].items():
        torch.testing.assert_close(same["state"][number], kept, rtol=2**-8, atol=1e-38)
    pipeline, learners = assemble(elsewhere, pipe.vae, cache.shift, cache.scaling, recipe.seed)
    maker = BatchMaker(cache, ["banana", "bell"], ["blue"], pipeline.tokenizer, pipeline.tokenizer_2, recipe.seed)
    assert train_transformer(recipe, learners, maker, pipeline, ["a bell"], elsewhere, 3, 0) == 3


def test_a_packed_run_of_other_latents_is_refused(tmp_path):
    folder = begin_with(embedded.model_directory(), tmp_path / "run")
    state = load_checkpoint(folder / CHECKPOINT_NAME)
    save_checkpoint(folder / CHECKPOINT_NAME, {**state, "shift": state["shift"] + 1})
    packed = pack_run(folder, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="is normalized by"):
        unpack_run(packed, embedded.model_directory(), tmp_path / "other")
    assert not (tmp_path / "other").exists(), "nothing is begun"
    with pytest.raises(FileNotFoundError, match="no pipeline in"):
        unpack_run(packed, tmp_path, tmp_path / "other")


def test_a_new_run_has_no_normalization_yet(tmp_path):
    assert kept_normalization(tmp_path) is None
