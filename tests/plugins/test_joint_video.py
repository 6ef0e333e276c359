"""diffusers' caches and offloads on transformed video models with text in the sequence, and packed ones."""

from __future__ import annotations

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading

import flexclear

from contract import rows_joint_video as rows
from contract.oracle import RADIUS, run, same, stacked, twins, under
from contract.shapes import Shape

CPU = torch.device("cpu")
SHAPE = Shape(6, 7, 20, 2)
STEPS = 6


def sequential(model):
    accelerate.cpu_offload(model, execution_device=CPU)


def group(**options):
    return lambda model: apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **options)


OFFLOADS = {
    "sequential": sequential,
    "groups of blocks": group(offload_type="block_level", num_blocks_per_group=1),
    "groups of leaves": group(offload_type="leaf_level"),
}


def transformed(video, model):
    return flexclear.transform(model, r=RADIUS, **video.frames, backend="sdpa")


@pytest.mark.kept("transform first-*-hunyuan_video", "offload first-groups of blocks-minimax_h3")
@pytest.mark.parametrize("video", rows.ROWS, ids=lambda video: video.name)
@pytest.mark.parametrize("kind", OFFLOADS)
@pytest.mark.parametrize("events", ["transform first", "offload first"])
def test_an_offloaded_model_gives_what_it_gives_at_home(video, kind, events):
    model, plain = twins(video)
    call = video.call(SHAPE)
    wanted = run(transformed(video, plain), call)
    if events == "transform first":
        transformed(video, model)
    OFFLOADS[kind](model)
    if events == "offload first":
        transformed(video, model)
    same(run(model, call), wanted)
    same(run(model, call), wanted)


UNKNOWN = {
    (name, cache) for name in ("hunyuan_video15", "minimax_h3", "cosmos3") for cache in ("first block", "magnitude")
}
"""Models whose blocks a cache of diffusers does not know, or whose arguments it does not find."""


class Clock:
    """The time step of the current call, as caches ask for it."""

    now = 0


def caches(video):
    """Each kind of cache, with settings that skip work within six steps."""
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

    return {
        "first block": FirstBlockCacheConfig(threshold=0.3),
        "magnitude": MagCacheConfig(
            num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, threshold=0.3, retention_ratio=0.2
        ),
        "pyramid attention broadcast": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            spatial_attention_block_identifiers=tuple(video.stacks),
            current_timestep_callback=lambda: Clock.now,
        ),
        "taylor seer": TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=2,
            max_order=0,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[rf"{stack}\.\d+\.{name}" for stack, name in video.stacks.items()],
        ),
    }


def steps(video, model):
    """Outputs of a run of denoising steps whose input drifts, ``[steps, ...]``."""
    outputs = []
    for step in range(STEPS):
        Clock.now = 900 - 100 * step
        call = video.call(SHAPE)
        name = "vision_tokens" if "vision_tokens" in call else "hidden_states"
        drift = 1 - 0.02 * step
        call[name] = [each * drift for each in call[name]] if isinstance(call[name], list) else call[name] * drift
        with torch.no_grad(), model.cache_context("cond"):
            outputs.append(stacked(model(**call)))
    return torch.stack(outputs)


def cached_steps(video, model, name):
    model.enable_cache(caches(video)[name])
    return steps(video, model)


@pytest.mark.kept("*-hunyuan_video", "*-cogvideox", "first block-*")
@pytest.mark.parametrize("video", rows.ROWS, ids=lambda video: video.name)
@pytest.mark.parametrize("name", ["first block", "magnitude", "pyramid attention broadcast", "taylor seer"])
def test_a_cache_skips_on_the_transformed_model_what_it_skips_under_the_dense_mask(video, name):
    """Or raises as it does on the stock one, where diffusers does not know the model's blocks."""
    ours, stock = twins(video)
    transformed(video, ours)
    if (video.name, name) in UNKNOWN:
        for model in (stock, ours):
            with pytest.raises((ValueError, KeyError)):
                cached_steps(video, model, name)
        return
    with under(video, SHAPE, all_used=False):
        uncached = steps(video, stock)
        wanted = cached_steps(video, stock, name)
    found = cached_steps(video, ours, name)
    assert (found - wanted).abs().max() <= 1e-4
    ours.disable_cache()
    assert (steps(video, ours) - uncached).abs().max() <= 1e-4
    assert (wanted - uncached).abs().max() > 1e-4, "the cache skipped nothing"
