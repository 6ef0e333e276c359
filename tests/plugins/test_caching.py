"""diffusers' caching hooks on a transformed FLUX: what a cache skips on the stock model it skips on ours."""

from __future__ import annotations

import pytest
import torch

import flexclear
from flexclear.masks import Disc, Layout, dense_mask

from helpers.models import flux_call, tiny_flux

STEPS = 6
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
MASK = {"attention_mask": dense_mask(Layout(9, 13, 20, order="raster"), Disc(3))}


class Clock:
    """The time step of the current call, as caches ask for it."""

    now = 0


def caches():
    """Each cache that FLUX has in diffusers, with settings that skip work within six steps."""
    from diffusers import (
        FasterCacheConfig,
        FirstBlockCacheConfig,
        MagCacheConfig,
        PyramidAttentionBroadcastConfig,
        TaylorSeerCacheConfig,
    )

    attention = {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (100, 800),
        "spatial_attention_block_identifiers": BLOCKS,
        "current_timestep_callback": lambda: Clock.now,
    }
    faster = {"is_guidance_distilled": True, "tensor_format": "BCHW", "attention_weight_callback": lambda _: 0.3}
    # Factors in bfloat16, the default, round by more than the bar: which way, the CPU decides.
    taylor = {
        "cache_interval": 2,
        "disable_cache_before_step": 2,
        "max_order": 1,
        "taylor_factors_dtype": torch.float32,
    }
    return {
        "first block": FirstBlockCacheConfig(threshold=0.3),
        "pyramid attention broadcast": PyramidAttentionBroadcastConfig(**attention),
        "faster": FasterCacheConfig(**attention, **faster),
        "magnitude": MagCacheConfig(
            num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, threshold=0.3, retention_ratio=0.2
        ),
        "taylor seer": TaylorSeerCacheConfig(**taylor),
        "taylor seer, lite": TaylorSeerCacheConfig(**taylor, use_lite_mode=True),
    }


def steps(model, extra=None, count=STEPS, height=9, width=13):
    """Outputs of a run of denoising steps whose input drifts, ``[count, ...]``."""
    outputs = []
    for step in range(count):
        Clock.now = 900 - 100 * step
        call = flux_call(height, width, 20)
        call["hidden_states"] = call["hidden_states"] * (1 - 0.02 * step)
        call["timestep"] = torch.full((1,), 1 - 0.1 * step)
        with torch.no_grad(), model.cache_context("cond"):
            outputs.append(model(**call, joint_attention_kwargs=dict(extra or {})).sample)
    return torch.stack(outputs)


@pytest.mark.parametrize("events", ["transform first", "cache first"])
@pytest.mark.parametrize("name", caches())
def test_a_cache_skips_on_the_transformed_model_what_it_skips_under_the_dense_mask(name, events):
    uncached = steps(tiny_flux(), MASK)
    stock, ours = tiny_flux(), tiny_flux()
    stock.enable_cache(caches()[name])
    expected = steps(stock, MASK)
    assert (expected - uncached).abs().max() > 1e-3, "the cache skipped nothing"
    if events == "transform first":
        flexclear.transform(ours, r=3, backend="sdpa")
    ours.enable_cache(caches()[name])
    if events == "cache first":
        flexclear.transform(ours, r=3, backend="sdpa")
    assert (steps(ours) - expected).abs().max() <= 1e-4
    ours.disable_cache()
    assert (steps(ours) - uncached).abs().max() <= 1e-4


def test_a_first_block_cache_that_never_skips_changes_nothing():
    from diffusers import FirstBlockCacheConfig

    model = flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    plain = steps(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
    assert torch.equal(steps(model), plain)


def test_pyramid_attention_broadcast_outside_its_range_changes_nothing():
    from diffusers import PyramidAttentionBroadcastConfig

    model = flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    plain = steps(model)
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-2, -1),
            spatial_attention_block_identifiers=BLOCKS,
            current_timestep_callback=lambda: Clock.now,
        )
    )
    assert torch.equal(steps(model), plain)


def test_a_cached_model_is_restored_with_its_cache():
    from diffusers import FirstBlockCacheConfig

    stock, ours = tiny_flux(), tiny_flux()
    for model in (stock, ours):
        model.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    flexclear.restore(flexclear.transform(ours, r=3, backend="sdpa"))
    assert torch.equal(steps(ours), steps(stock))


@pytest.mark.parametrize("change", ["transform", "restore", "order"])
def test_what_was_cached_in_another_token_order_is_not_used(change):
    from diffusers import FirstBlockCacheConfig

    ours, fresh = tiny_flux(), tiny_flux()
    for model in (ours, fresh):
        model.enable_cache(FirstBlockCacheConfig(threshold=1e9))

    def turn(model, half):
        if change == "restore":
            (flexclear.transform(model, r=3, backend="sdpa") if half == 0 else flexclear.restore(model))
        elif change == "order":
            flexclear.transform(model, r=3, backend="sdpa", order=("tiled", "raster")[half])
        elif half == 1:
            flexclear.transform(model, r=3, backend="sdpa")

    turn(ours, 0)
    steps(ours, count=2)
    turn(ours, 1)
    turn(fresh, 0)
    turn(fresh, 1)
    assert (steps(ours, count=2) - steps(fresh, count=2)).abs().max() <= 1e-6


def test_a_change_of_radius_keeps_what_was_cached():
    from diffusers import FirstBlockCacheConfig

    model = flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    steps(model, count=1)
    wide = flexclear.transform(tiny_flux(), r=6, backend="sdpa")
    flexclear.transform(model, r=6, backend="sdpa")
    assert (steps(model, count=1) - steps(wide, count=1)).abs().max() > 1e-4


def frequency_caches():
    from diffusers import FasterCacheConfig, SeaCacheConfig

    return {
        "FasterCache": FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-2, -1),
            tensor_format="BCHW",
            attention_weight_callback=lambda _: 0.3,
            current_timestep_callback=lambda: Clock.now,
        ),
        "SeaCache": SeaCacheConfig(),
    }


@pytest.mark.parametrize("name", frequency_caches())
def test_a_cache_that_transforms_the_picture_s_frequencies_needs_raster_order(name):
    model = flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    model.enable_cache(frequency_caches()[name])
    with pytest.raises(ValueError, match=rf"{name} .* order='raster'"):
        steps(model, count=1)
    model.disable_cache()
    assert steps(model, count=1).isfinite().all()
