"""I-Max: the low band, the step, and whole stages against loops written down from the method's formula."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import flexclear
from flexclear.highres import low_band, projected_velocity, upscale_cascade
from flexclear.highres.imax import decay, projected_scheduler

PROMPT = "a red apple on a blue background"


def haar(side):
    """Haar's first approximation band of ``side`` numbers, transformed back, as a matrix; an odd end is mirrored."""
    low = np.zeros((side, -(-side // 2)))
    for cell in range(low.shape[1]):
        members = [index for index in (2 * cell, 2 * cell + 1) if index < side]
        low[members, cell] = 1 / math.sqrt(len(members))
    return torch.from_numpy(low @ low.T)


def means(latents):
    """The same of both axes, computed in float64."""
    return (haar(latents.shape[-2]) @ latents.double() @ haar(latents.shape[-1])).to(latents.dtype)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (7, 12), (9, 5), (2, 2), (3, 2), (1, 4)])
def test_the_low_band_is_that_of_haar_s_transform(height, width):
    latents = torch.randn(2, 3, height, width)
    band = low_band(latents)
    assert (band.shape, band.dtype) == (latents.shape, latents.dtype)
    # A mean of four numbers of size about 1: three additions, rounded each, and the result that is compared.
    assert (band - means(latents)).abs().max() <= 4 * torch.finfo(torch.float32).eps * latents.abs().max()
    assert (band - latents).abs().max() > 1e-2
    assert (low_band(band) - band).abs().max() <= 4 * torch.finfo(torch.float32).eps, "a projection"


def test_a_second_level_means_cells_of_four_by_four():
    latents = torch.randn(1, 2, 16, 8, dtype=torch.float64)
    cells = latents.unfold(-2, 4, 4).unfold(-2, 4, 4).mean((-2, -1))
    expected = cells.repeat_interleave(4, -2).repeat_interleave(4, -1)
    assert (low_band(latents, level=2) - expected).abs().max() <= 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_low_band_is_computed_where_the_latents_are_and_rounded_once(dtype):
    latents = torch.randn(2, 3, 8, 6).to(dtype)
    assert torch.equal(low_band(latents), low_band(latents.float()).to(dtype))
    assert low_band(torch.empty(2, 16, 128, 128, device="meta"), level=3).device.type == "meta", "no copy to the CPU"


def test_the_velocity_is_the_formula_of_the_method():
    v, x, g = torch.randn(3, 2, 4, 6, 8)
    t, c = 0.7, 0.4
    p = (x - g) / t
    expected = v + c * (means(p) - means(v))
    assert (projected_velocity(v, x, g, t, c, low_band) - expected).abs().max() <= 1e-5
    assert torch.equal(projected_velocity(v, x, g, t, 0.0, low_band), v)


def test_the_weight_falls_from_one_as_a_half_cosine():
    weights = [decay(step, 10) for step in range(10)]
    assert weights[0] == 1
    assert weights[5] == pytest.approx(0.5)
    assert weights == sorted(weights, reverse=True)
    assert decay(10, 10) == pytest.approx(0)


def test_the_full_band_at_full_weight_leads_to_the_guide_whatever_the_model_says(flux, monkeypatch):
    guide, latents = torch.randn(2, 1, 16, 6, 8)
    monkeypatch.setattr("flexclear.highres.imax.decay", lambda step, steps: 1.0)
    same = lambda t: t  # noqa: E731
    scheduler = projected_scheduler(flux.scheduler, guide, same, same, same)
    scheduler.set_timesteps(6, mu=0.7, sigmas=np.linspace(1.0, 1 / 6, 6))
    for t in scheduler.timesteps:
        latents = scheduler.step(torch.randn_like(latents), t, latents, return_dict=False)[0]
    assert (latents - guide).abs().max() <= 1e-5


def text_of(pipe, kind):
    if kind == "flux":
        embeds, pooled, ids = pipe.encode_prompt(PROMPT, None, max_sequence_length=16)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": ids}
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPT, None, None, max_sequence_length=16)
    return {
        "encoder_hidden_states": torch.cat([negative, embeds]),
        "pooled_projections": torch.cat([negative_pooled, pooled]),
    }


@torch.no_grad()
def by_hand(pipe, kind, picture, height, width, steps, shift, guidance, seed):
    """An I-Max stage as a loop over the bare model; pixels 0 to 255."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    config = pipe.vae.config
    g = (pipe.vae.encode(pixels).latent_dist.sample(generator) - config.shift_factor) * config.scaling_factor
    x = torch.randn(1, 16, height // 4, width // 4, generator=generator)
    even = torch.linspace(1, 1 / steps if kind == "flux" else shift * 1e-3 / (1 + (shift - 1) * 1e-3), steps)
    levels = torch.cat([shift * even / (1 + (shift - 1) * even), torch.zeros(1)])
    text = text_of(pipe, kind)
    for i, (t, after) in enumerate(itertools.pairwise(levels)):
        if kind == "flux":
            ids = torch.zeros(height // 8, width // 8, 3)
            ids[..., 1], ids[..., 2] = torch.arange(height // 8)[:, None], torch.arange(width // 8)
            tokens = pipe._pack_latents(x, 1, 16, height // 4, width // 4)
            v = pipe.transformer(
                hidden_states=tokens,
                timestep=t[None],
                guidance=torch.tensor([guidance]),
                img_ids=ids.view(-1, 3),
                **text,
            ).sample
            v = pipe._unpack_latents(v, height, width, pipe.vae_scale_factor)
        else:
            without, with_text = pipe.transformer(
                hidden_states=torch.cat([x, x]), timestep=(1000 * t)[None].expand(2), **text
            ).sample.chunk(2)
            v = without + guidance * (with_text - without)
        p = (x - g) / t
        c = 0.5 * (1 + math.cos(math.pi * i / steps))
        x = x + (after - t) * (v + c * (means(p) - means(v)))
    decoded = pipe.vae.decode(x / config.scaling_factor + config.shift_factor).sample
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255)[0].permute(1, 2, 0)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
@pytest.mark.parametrize(("height", "width"), [(80, 80), (72, 96)])
def test_a_stage_is_the_loop_of_the_method(request, kind, height, width, photo):
    pipe = request.getfixturevalue(kind)
    flexclear.transform(pipe, r=3, backend="sdpa")
    done = upscale_cascade(
        pipe,
        PROMPT,
        [(height, width)],
        image=photo.resize((width // 2, height // 2)),
        method="imax",
        steps=3,
        guidance=5.0,
        max_sequence_length=16,
        seed=7,
        tile=128,
    )
    enlarged = photo.resize((width // 2, height // 2)).resize((width, height), resample=3)
    stage, tokens = done.stages[0], height * width // 64
    assert stage.training_tokens == 64 + 16 + (0 if kind == "flux" else 77), "8 x 8 tokens, T5's text, CLIP's for SD3"
    assert stage.ntk_floor == (pytest.approx(8 / math.sqrt(tokens)) if kind == "flux" else 0)
    with flexclear.override(**stage.switches):
        expected = by_hand(pipe, kind, enlarged, height, width, 3, 6.0, 5.0, seed=7)
    ours = torch.from_numpy(np.array(done.image)).float()
    assert (ours - expected).abs().max() <= 1, "eight bits"
    with flexclear.override(**stage.switches):
        other = by_hand(pipe, kind, photo.resize((width, height)).rotate(180), height, width, 3, 6.0, 5.0, seed=7)
    assert (other - expected).abs().max() > 5, "the guide makes no difference here"
