"""What diffusers' hooks and guiders do inside a model: as on the original, in any token order, or refused by name.

A window of 200 tokens sees everything, so that the stock model needs no mask; windows have tests of their own.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from unittest.mock import Mock

import diffusers
import diffusers.guiders
import diffusers.hooks
import pytest
import torch
from diffusers import LayerSkipConfig
from diffusers.guiders import BaseGuidance
from diffusers.hooks import HookRegistry, ModelHook, apply_layer_skip
from diffusers.hooks.layer_skip import _LAYER_SKIP_HOOK
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)

import flexclear
from flexclear.compile import why_not_compiled
from flexclear.runtime.hooks import entry_hook_of

from helpers import models, parallel_families

CPU = torch.device("cpu")
EVENTS = ("hook first", "transform first")


def build(kind, height=16, width=16):
    """A small model and a call of it; of Qwen-Image one with a square image and no reference images."""
    if kind != "qwen":
        return parallel_families.build(kind)
    return models.tiny_qwen(), models.qwen_call((height, width), (), 12, 2)


def windowed(model, **options):
    return flexclear.transform(model, r=200, **{"backend": "sdpa", **options})


def hooked(kind, hook, events=None, **options):
    """The output of a model with a hook; transformed before or after that unless ``events`` is None."""
    model, call = build(kind)
    if events == "transform first":
        windowed(model, **options)
    hook(model)
    if events == "hook first":
        windowed(model, **options)
    return parallel_families.sample(model, call)


def skip(indices=(0,), fqn="auto", **config):
    return lambda model: apply_layer_skip(model, LayerSkipConfig(indices=list(indices), fqn=fqn, **config))


SCORES = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
ATTENTION = {"skip_attention": True, "skip_ff": False}
FEEDFORWARD = {"skip_attention": False, "skip_ff": True}
SKIPS = {
    "scores, Qwen-Image": ("qwen", skip(**SCORES)),
    "scores, Z-Image": ("zimage, no pads", skip(fqn="layers", **SCORES)),
    "attention, Z-Image": ("zimage, no pads", skip(fqn="layers", **ATTENTION)),
    "feed-forward, Qwen-Image": ("qwen", skip(**FEEDFORWARD)),
    "feed-forward, SD3": ("sd3", skip(**FEEDFORWARD)),
    "single block, FLUX.2": ("flux2", skip(fqn="single_transformer_blocks")),
}


@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("name", SKIPS)
def test_a_skipped_part_of_a_layer_is_skipped_on_the_transformed_model(name, events):
    kind, hook = SKIPS[name]
    expected = hooked(kind, hook)
    assert (expected - hooked(kind, lambda model: None)).abs().max() > 1e-3, "the hook makes no difference here"
    assert (hooked(kind, hook, events) - expected).abs().max() <= 1e-5


@pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))
@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("kind", ["qwen", "zimage, no pads"])
def test_skipped_scores_are_skipped_under_flex_too(kind, events):
    names = ("transformer_blocks",) if kind == "qwen" else ("noise_refiner", "layers")

    def hook(model):  # on every windowed layer, so that nothing is left to compile
        for number, name in enumerate(names):
            config = LayerSkipConfig(indices=list(range(len(getattr(model, name)))), fqn=name, **SCORES)
            diffusers.hooks.layer_skip._apply_layer_skip_hook(model, config, f"{_LAYER_SKIP_HOOK}_{number}")

    expected = hooked(kind, hook)
    assert (hooked(kind, hook, events, backend="flex") - expected).abs().max() <= 1e-5


def test_a_skip_hook_that_is_gone_leaves_the_windows():
    model, call = build("qwen")
    plain = parallel_families.sample(windowed(model), call)
    skip(**SCORES)(model)
    assert (parallel_families.sample(model, call) - plain).abs().max() > 1e-3
    HookRegistry.check_if_exists_or_initialize(model).remove_hook(_LAYER_SKIP_HOOK, recurse=True)
    assert torch.equal(parallel_families.sample(model, call), plain)


def smooth(model):
    config = SmoothedEnergyGuidanceConfig(indices=[0], fqn="layers" if hasattr(model, "layers") else "auto")
    _apply_smoothed_energy_guidance_hook(model, config, blur_sigma=9999999.0)  # the guider's own default


@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("kind", ["qwen", "sd3", "zimage, no pads"])
def test_smoothed_energy_guidance_needs_raster_order(kind, events):
    with pytest.raises(ValueError, match=r"Smoothed Energy Guidance blurs .* in tiled order\. .*order='raster'"):
        hooked(kind, smooth, events)
    expected = hooked(kind, smooth)
    assert (expected - hooked(kind, lambda model: None)).abs().max() > 1e-3, "the hook makes no difference here"
    assert (hooked(kind, smooth, events, order="raster") - expected).abs().max() <= 1e-5


def test_smoothed_energy_guidance_on_several_ranks_is_refused_in_any_order():
    model, call = build("qwen")
    smooth(windowed(model, order="raster"))
    entry_hook_of(model).parallel = Mock()
    with pytest.raises(ValueError, match=r"blurs a square of the image .* of which each of several ranks has a part"):
        parallel_families.sample(model, call)


def run(model, call, steps=4):
    """Outputs of denoising steps whose input drifts."""
    outputs = []
    for step in range(steps):
        drifted = {**call, "hidden_states": call["hidden_states"] * (1 - 0.02 * step)}
        with model.cache_context("cond"):
            outputs.append(parallel_families.sample(model, drifted))
    return torch.stack(outputs)


CACHES = {
    "first block": lambda: diffusers.FirstBlockCacheConfig(threshold=0.3),
    "magnitude": lambda: diffusers.MagCacheConfig(
        num_inference_steps=4, mag_ratios=[1.0] * 4, threshold=0.3, retention_ratio=0.2
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_skips_on_qwen_image_what_it_skips_on_the_original(name):
    model, call = build("qwen")
    model.enable_cache(CACHES[name]())
    expected = run(model, call)
    assert (expected - run(*build("qwen"))).abs().max() > 1e-3, "the cache skipped nothing"
    ours, _ = build("qwen")
    windowed(ours).enable_cache(CACHES[name]())
    assert (run(ours, call) - expected).abs().max() <= 5e-5


@pytest.mark.parametrize("kind", ["flux", "flux2", "chroma"])
@pytest.mark.parametrize("hook", [skip(**SCORES), skip(**ATTENTION), smooth])
def test_what_diffusers_does_not_do_to_an_attention_class_it_does_not_do_to_ours(kind, hook):
    for events in (None, "transform first"):
        with pytest.raises(AttributeError, match="has no attribute 'is_cross_attention'"):
            hooked(kind, hook, events)


# Guiders: those that reach into the model do it by the hooks above, the others see outputs only, which are in raster order.

CONFIG = LayerSkipConfig(indices=[0], fqn="transformer_blocks", **FEEDFORWARD)
INSIDE = {
    "AutoGuidance": {"auto_guidance_config": CONFIG},
    "PerturbedAttentionGuidance": {"perturbed_guidance_layers": [0], "perturbed_guidance_start": 0.0},
    "SkipLayerGuidance": {"skip_layer_config": CONFIG, "skip_layer_guidance_start": 0.0},
    "SmoothedEnergyGuidance": {
        "seg_guidance_config": SmoothedEnergyGuidanceConfig(indices=[0], fqn="transformer_blocks")
    },
}


def guided(name, order=None):
    """One step of a run under a guider; on the stock model if there is no ``order``."""
    guider = getattr(diffusers.guiders, name)(**INSIDE.get(name, {}))
    model, call = build("qwen")
    if order is not None:
        windowed(model, order=order)
    text = call["encoder_hidden_states"]
    guider.set_state(step=1, num_inference_steps=10, timestep=call["timestep"])
    batches = guider.prepare_inputs({"text": (text, text.flip(-1))})
    for number, batch in enumerate(batches, 1):
        if name == "SmoothedEnergyGuidance":
            guider._count_prepared = number  # In diffusers 0.42 it reads this count and never counts.
        guider.prepare_models(model)
        batch.noise_pred = parallel_families.sample(model, {**call, "encoder_hidden_states": batch.text})
        guider.cleanup_models(model)
    assert len(batches) > 1, "the guider asks for one prediction only"
    return guider(batches)[0]


GUIDERS = {
    name: kind
    for name, kind in inspect.getmembers(diffusers.guiders, inspect.isclass)
    if issubclass(kind, BaseGuidance) and kind is not BaseGuidance
}


def test_every_guider_that_reaches_into_the_model_is_known_here():
    inside = {name for name, kind in GUIDERS.items() if kind.prepare_models is not BaseGuidance.prepare_models}
    assert inside <= set(INSIDE)


@pytest.mark.parametrize("name", ["ClassifierFreeGuidance", "AdaptiveProjectedGuidance", *INSIDE])
def test_a_guider_gives_what_it_gives_on_the_original(name):
    expected = guided(name)
    if name == "SmoothedEnergyGuidance":
        with pytest.raises(ValueError, match="Smoothed Energy Guidance blurs"):
            guided(name, "tiled")
    order = "raster" if name == "SmoothedEnergyGuidance" else "tiled"
    assert (guided(name, order) - expected).abs().max() <= 5e-5


DECIDED = {
    "context_parallel": "refused, tests/plugins/test_modes.py",
    "faster_cache": "works, undistilled in raster order only, tests/plugins/test_caching.py",
    "first_block_cache": "works, tests/plugins/test_caching.py",
    "group_offloading": "works, tests/plugins/test_offload.py",
    "layer_skip": "works, here",
    "layerwise_casting": "works, tests/plugins/test_modes.py",
    "mag_cache": "works, tests/plugins/test_caching.py",
    "pyramid_attention_broadcast": "works, tests/plugins/test_caching.py",
    "sea_cache": "raster order only, tests/plugins/test_caching.py",
    "smoothed_energy_guidance_utils": "raster order only, here",
    "taylorseer_cache": "works, tests/plugins/test_caching.py",
    "tensor_parallel": "works, tests/parallel/test_two_processes.py",
    "text_kv_cache": "has hooks for blocks of NucleusMoE-Image alone",
}


def test_every_hook_of_diffusers_is_decided():
    modules = [name for _, name, _ in pkgutil.iter_modules(diffusers.hooks.__path__)]
    with_hooks = set()
    for name in modules:
        module = importlib.import_module(f"diffusers.hooks.{name}")
        own = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
        if any(issubclass(kind, ModelHook) and kind is not ModelHook for kind in own):
            with_hooks.add(name)
    assert with_hooks <= set(DECIDED)
