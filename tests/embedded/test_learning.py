"""What a training step of the embedded model sees and minimizes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image

from flexclear import embedded
from flexclear.embedded.evaluation import Request
from flexclear.embedded.retrieval import Match
from flexclear.embedded.train.batches import BATCH_KINDS, BatchMaker, shares
from flexclear.embedded.train.emphasis import LARGEST_ERROR_WEIGHT, faintness, read_emphasis, weigh, write_emphasis
from flexclear.embedded.train.latents import LatentCache, LatentSet
from flexclear.embedded.train.transformer import Learners, TransformerRecipe, flow_loss

NAMES = ("banana", "bell", "bus")


def _latents(side: int) -> LatentSet:
    generator = torch.Generator().manual_seed(side)
    emoji = torch.arange(30) % 3
    return LatentSet(torch.randn(30, 8, side, side, generator=generator).half(), emoji, torch.zeros_like(emoji))


def _maker(pipe, emphasis=None) -> BatchMaker:
    weights = None if emphasis is None else torch.tensor(emphasis)
    cache = LatentCache(_latents(32), _latents(64), 0.0, 1.0)
    return BatchMaker(cache, NAMES, ["blue"], pipe.tokenizer, pipe.tokenizer_2, seed=3, emphasis=weights)


def _shown(maker: BatchMaker, steps: int) -> Counter[int]:
    sets = [maker.cache.small, maker.cache.large]
    seen: Counter[int] = Counter()
    for step in range(steps):
        for latents in maker.make(step).latents:
            chosen = sets[0] if latents.shape[-1] == 32 else sets[1]
            row = (chosen.latents.float() == latents).flatten(1).all(1).nonzero().item()
            seen[int(chosen.emoji[row])] += 1
    return seen


def test_emphasis_decides_how_often_an_emoji_is_shown(pipe):
    even = _shown(_maker(pipe), 60)
    assert max(even.values()) < 1.5 * min(even.values())
    favoured = _shown(_maker(pipe, [[8.0], [1.0], [1.0]]), 60)
    assert favoured[0] > 2.5 * (favoured[1] + favoured[2])
    assert _shown(_maker(pipe, [[1.0], [0.0], [1.0]]), 20)[1] == 0


def test_a_step_is_the_same_every_time(pipe):
    first, again = (_maker(pipe, [[2.0], [1.0], [1.0]]).make(11) for _ in range(2))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.t5_ids, again.t5_ids)


def test_noisier_steps_see_the_same_pictures_at_higher_levels(pipe):
    plain = _maker(pipe)
    for step in range(4):
        first, noisier = plain.make(step), dataclasses.replace(plain, noisier=1.2).make(step)
        assert torch.equal(first.latents, noisier.latents)
        assert torch.equal(first.noise, noisier.noise)
        torch.testing.assert_close(noisier.sigmas.logit(), first.sigmas.logit() + 1.2, rtol=1e-4, atol=1e-4)


def test_the_share_of_large_pictures_is_what_was_asked_for(pipe):
    usual = sum(kind.share for kind in BATCH_KINDS if kind.large)
    for asked in (None, 0.0, 0.8, 1.0):
        drawn = shares(asked)
        large = sum(share for share, kind in zip(drawn, BATCH_KINDS, strict=True) if kind.large)
        assert math.isclose(large, usual if asked is None else asked, abs_tol=1e-12)
        assert math.isclose(sum(drawn), 1.0)
    maker = dataclasses.replace(_maker(pipe), large_share=1.0)
    assert {maker.make(step).latents.shape[-1] for step in range(8)} == {64}


def test_the_empty_caption_has_the_shape_of_the_others(pipe):
    for step in range(12):
        batch = _maker(pipe).make(step)
        assert batch.empty_clip_ids.shape == batch.clip_ids.shape
        assert batch.empty_t5_ids.shape == batch.t5_ids.shape
        assert batch.t5_ids.shape[1] in {kind.text_length for kind in BATCH_KINDS}
        words = pipe.tokenizer_2.batch_decode(batch.empty_t5_ids, skip_special_tokens=True)
        assert set(words) == {""}


def test_an_emoji_weighs_more_the_more_often_it_is_wrong(vocabulary):
    requests = [Request(emoji, 0, seed) for emoji in (0, 1, 2) for seed in range(4)]
    answers = [0, 0, 0, 0, 1, 5, 1, 5, 7, 7, 7, 7]
    weights = weigh(vocabulary, requests, [Match(emoji, 0, 0.01, 9, 0.02) for emoji in answers], strength=4.0)
    names = [item.name for item in vocabulary.emoji]
    assert [weights[names[i]] for i in range(4)] == [1.0, 3.0, 5.0, 1.0]


def test_an_emoji_weighs_more_the_worse_it_is_drawn(vocabulary):
    requests = [Request(emoji, 0, seed) for emoji in range(5) for seed in range(2)]
    errors = [0.01, 0.01, 0.02, 0.02, 0.02, 0.02, 0.03, 0.03, 0.5, 0.9]
    matches = [Match(r.emoji, 0, error, 9, 1.0) for r, error in zip(requests, errors, strict=True)]
    weights = weigh(vocabulary, requests, matches, strength=4.0)
    names = [item.name for item in vocabulary.emoji]
    assert [weights[names[i]] for i in range(6)] == pytest.approx([1.0, 1.0, 1.0, 1.5, LARGEST_ERROR_WEIGHT, 1.0])


def test_weights_are_read_back_and_must_be_about_the_same_emoji(tmp_path):
    assert read_emphasis(tmp_path, NAMES) is None
    write_emphasis(tmp_path, {"bus": 2.0, "banana": 1.0, "bell": 3.0})
    assert read_emphasis(tmp_path, NAMES) == [1.0, 3.0, 2.0]
    with pytest.raises(ValueError, match="cactus"):
        read_emphasis(tmp_path, [*NAMES, "cactus"])


def test_a_pair_weighs_more_the_fainter_it_is():
    yellow, half = Image.new("RGBA", (8, 8), (250, 210, 80, 255)), Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    colours = [(252, 214, 84), (0, 0, 0), (255, 255, 255), (200, 160, 30)]
    weights = faintness([yellow, half], colours, 0.5)
    assert weights.shape == (2, 4)
    assert weights[0, 0] == weights[1, 1] == 4
    assert weights[0, 1] == 1
    assert torch.equal(faintness([yellow, half], colours, 0.0), torch.ones(2, 4))
    contrast = [((c - torch.tensor([250, 210, 80])) / 255).square().mean() for c in map(torch.tensor, colours)]
    contrast += [((128 / 255) * c / 255).square().mean() for c in map(torch.tensor, colours)]
    by_hand = (torch.stack(contrast).median() / contrast[3]).sqrt()
    torch.testing.assert_close(weights[0, 3], by_hand.clamp(1, 4))


def test_guidance_begins_where_it_is_told_to():
    assert [TransformerRecipe(guided_from=5).guidance_at(step) for step in (4, 5)] == [0.0, 0.4]
    assert TransformerRecipe().guidance_at(10**6) == 0.0


@pytest.fixture(scope="module")
def learners() -> Learners:
    loaded = embedded.pipeline(torch.float32)
    return Learners(loaded.transformer, loaded.text_encoder, loaded.text_encoder_2)


def _predict(learners, batch, clip_ids, t5_ids):
    pictures, channels, height, width = batch.latents.shape
    sigmas = batch.sigmas.view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * batch.latents + sigmas * batch.noise
    text = learners.t5(t5_ids)[0]
    ids = FluxPipeline._prepare_latent_image_ids(pictures, height // 2, width // 2, "cpu", torch.float32)
    packed = learners.transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, pictures, channels, height, width),
        encoder_hidden_states=text,
        pooled_projections=learners.clip(clip_ids).pooler_output,
        timestep=batch.sigmas,
        img_ids=ids,
        txt_ids=torch.zeros(text.shape[1], 3),
    ).sample
    return FluxPipeline._unpack_latents(packed, height * 8, width * 8, 8)


def test_guidance_pushes_the_target_away_from_the_empty_caption(pipe, learners):
    batch = _maker(pipe).make(0)
    with torch.no_grad():
        named = _predict(learners, batch, batch.clip_ids, batch.t5_ids)
        empty = _predict(learners, batch, batch.empty_clip_ids, batch.empty_t5_ids)
        assert F.mse_loss(named, empty) > 1e-3
    target = batch.noise - batch.latents
    for guidance in (0.0, 0.4):
        loss = flow_loss(learners, batch, half_precision=False, guidance=guidance)
        wanted = target + guidance * (named - empty)
        torch.testing.assert_close(loss.detach(), F.mse_loss(named, wanted), rtol=1e-4, atol=0)


def test_the_guided_target_passes_no_gradient(pipe, learners):
    batch = _maker(pipe).make(0)
    weight = learners.transformer.proj_out.weight
    named = _predict(learners, batch, batch.clip_ids, batch.t5_ids)
    with torch.no_grad():
        empty = _predict(learners, batch, batch.empty_clip_ids, batch.empty_t5_ids)
        wanted = batch.noise - batch.latents + 0.4 * (named - empty)
    (by_hand,) = torch.autograd.grad(F.mse_loss(named, wanted), weight)
    (gradient,) = torch.autograd.grad(flow_loss(learners, batch, half_precision=False, guidance=0.4), weight)
    torch.testing.assert_close(gradient, by_hand, rtol=1e-3, atol=1e-7)
