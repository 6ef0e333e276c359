"""diffusers' caches and offloading on transformed video models: what they skip on the stock model they skip on ours."""

from __future__ import annotations

import copy
import types

import pytest
import torch

import flexclear

from .test_offload import KINDS
from contract.oracle import RADIUS, TOLERANCE, differ, run, same, under
from contract.rows_video import LTX, LTX2, SKYREELS_V2, WAN, WAN_VACE
from contract.shapes import Shape

STEPS = 6
SHAPE = Shape(5, 6, 7, 2, frames=3)
CACHED = (WAN, WAN_VACE, LTX)
"""Models whose blocks diffusers' caches know."""
OTHERS = (SKYREELS_V2, LTX2)

named = pytest.mark.parametrize("video", CACHED, ids=lambda video: video.name)
every = pytest.mark.parametrize("video", [*CACHED, *OTHERS], ids=lambda video: video.name)


class Clock:
    """The time step of the current call, as caches ask for it."""

    now = 0


def caches(video):
    """Caches with settings that skip work within six steps."""
    from diffusers import (
        FirstBlockCacheConfig,
        MagCacheConfig,
        PyramidAttentionBroadcastConfig,
        TaylorSeerCacheConfig,
    )

    broadcast = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        spatial_attention_block_identifiers=tuple(video.stacks),
        current_timestep_callback=lambda: Clock.now,
    )
    taylor = {
        "cache_interval": 2,
        "disable_cache_before_step": 2,
        "max_order": 0,
        "taylor_factors_dtype": torch.float32,
        "cache_identifiers": [rf"{stack}\.\d+\.{name}" for stack, name in video.stacks.items()],
    }
    magnitude = {"num_inference_steps": STEPS, "mag_ratios": [1.0] * STEPS, "threshold": 0.3, "retention_ratio": 0.2}
    return {
        "first block": FirstBlockCacheConfig(threshold=0.3),
        "pyramid attention broadcast": broadcast,
        "magnitude": MagCacheConfig(**magnitude),
        "taylor seer": TaylorSeerCacheConfig(**taylor),
    }


def steps(video, model):
    """Outputs of a run of denoising steps whose input drifts, ``[steps, ...]``."""
    outputs = []
    for step in range(STEPS):
        Clock.now = 900 - 100 * step
        call = video.call(SHAPE)
        call["hidden_states"] = call["hidden_states"] * (1 - 0.02 * step)
        with torch.no_grad(), model.cache_context("cond"):
            outputs.append(model(**call).sample)
    return torch.stack(outputs)


def masked(video, model):
    with under(video, SHAPE, all_used=False):
        return steps(video, model)


@pytest.mark.kept("*-wan", "first block-transform first-*")
@named
@pytest.mark.parametrize("events", ["transform first", "cache first"])
@pytest.mark.parametrize("name", ["first block", "pyramid attention broadcast", "magnitude", "taylor seer"])
def test_a_cache_skips_on_the_transformed_model_what_it_skips_under_the_dense_mask(video, name, events):
    uncached, stock, ours = masked(video, video.build()), video.build(), video.build()
    stock.enable_cache(caches(video)[name])
    expected = masked(video, stock)
    assert (expected - uncached).abs().max() > 1e-3, "the cache skipped nothing"
    if events == "transform first":
        flexclear.transform(ours, r=RADIUS, **video.frames, backend="sdpa")
    ours.enable_cache(caches(video)[name])
    if events == "cache first":
        flexclear.transform(ours, r=RADIUS, **video.frames, backend="sdpa")
    assert differ(steps(video, ours), expected) <= STEPS * TOLERANCE
    ours.disable_cache()
    assert differ(steps(video, ours), uncached) <= TOLERANCE


@pytest.mark.parametrize("video", OTHERS, ids=lambda video: video.name)
def test_a_cache_that_does_not_know_the_stock_model_says_so_of_ours(video):
    said = []
    for model in (video.build(), flexclear.transform(video.build(), r=RADIUS, **video.frames, backend="sdpa")):
        with pytest.raises(ValueError, match="not registered") as error:
            model.enable_cache(caches(video)["first block"])
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.kept("*-wan")
@every
@pytest.mark.parametrize("events", ["transform first", "offload first"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "disk" not in kind])
def test_an_offloaded_model_gives_what_it_gives_at_home(video, kind, events):
    model = video.build()
    plain = flexclear.transform(copy.deepcopy(model), r=RADIUS, **video.frames, backend="sdpa")
    if events == "transform first":
        flexclear.transform(model, r=RADIUS, **video.frames, backend="sdpa")
    KINDS[kind](model, None)
    if events == "offload first":
        flexclear.transform(model, r=RADIUS, **video.frames, backend="sdpa")
    call = {**video.call(SHAPE), "return_dict": False}  # accelerate does not know what LTX-2 returns
    for _ in range(2):
        same(run(model, call), run(plain, call), kind)


@every
def test_another_attention_backend_is_refused(video):
    model = flexclear.transform(video.build(), r=RADIUS, **video.frames, backend="sdpa")
    with pytest.raises(ValueError, match="cannot be set on a transformed model"):
        model.set_attention_backend("native")


@named
def test_context_parallelism_is_refused(video):
    model = video.build()
    config = types.SimpleNamespace(context_parallel_config=types.SimpleNamespace(ring_degree=2, ulysses_degree=1))
    model._parallel_config = config
    with pytest.raises(ValueError, match="has context parallelism"):
        flexclear.transform(model, r=RADIUS, **video.frames)
