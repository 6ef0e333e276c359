"""Offloading of a transformed FLUX. Without an accelerator "onto the device" means the CPU as well, but the hooks are
the real ones: weights live on the meta device or on disk between calls and must be back in time."""

from __future__ import annotations

from types import SimpleNamespace

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading

import flexclear
from flexclear.families import family_of
from flexclear.families.latents import StretchHook
from flexclear.runtime.carrying import here

from helpers.models import flux_call, tiny_flux
from helpers.models_joint_video import tiny_minimax_h3
from helpers.models_video import tiny_wan

CPU = torch.device("cpu")
EVENTS = ["transform first", "offload first"]


def sequential(model, folder):
    accelerate.cpu_offload(model, execution_device=CPU)


def to_disk(model, folder):
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def whole(model, folder):
    accelerate.cpu_offload_with_hook(model, execution_device=CPU)


def group(**options):
    def apply(model, folder):
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **options)

    return apply


def group_to_disk(model, folder):
    apply_group_offloading(
        model,
        onload_device=CPU,
        offload_device=CPU,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(folder),
    )


def by_model_method(model, folder):
    model.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=2
    )


KINDS = {
    "sequential": sequential,
    "to disk": to_disk,
    "whole model": whole,
    "groups of blocks": group(offload_type="block_level", num_blocks_per_group=1),
    "groups of leaves": group(offload_type="leaf_level"),
    "groups of blocks, to disk": group_to_disk,
    "enable_group_offload": by_model_method,
}


def run(model, height=9, width=13):
    with torch.no_grad():
        return model(**flux_call(height, width, 20)).sample


@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_model_gives_what_it_gives_at_home(kind, events, tmp_path):
    # Pooling weights are parameters of the processors themselves: what an offload is likeliest to leave behind.
    options = {"r": 3, "backend": "sdpa", "down_factor": 2}
    plain = flexclear.transform(tiny_flux(), **options)
    model = tiny_flux()
    if events == "transform first":
        flexclear.transform(model, **options)
    KINDS[kind](model, tmp_path)
    if events == "offload first":
        flexclear.transform(model, **options)
    for size in ((9, 13), (12, 8)):
        assert (run(model, *size) - run(plain, *size)).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["sequential", "to disk"])
def test_weights_are_away_between_calls(kind, tmp_path):
    model = flexclear.transform(tiny_flux(), r=3, down_factor=2, backend="sdpa")
    KINDS[kind](model, tmp_path)
    run(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_model_without_pooling_weights_does_likewise(kind, tmp_path):
    plain, model = (flexclear.transform(tiny_flux(), r=3, backend="sdpa") for _ in range(2))
    KINDS[kind](model, tmp_path)
    assert (run(model) - run(plain)).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("make", "argument"), [(tiny_wan, torch.zeros(1, 4, 3, 6, 8)), (tiny_minimax_h3, torch.zeros(9, 3))]
)
def test_frequencies_of_another_base_follow_an_offloaded_model_to_its_device(make, argument):
    """A model may be on the CPU when a call enters it, and moves before its modules run. "meta" stands for a GPU."""
    model = make()
    family = family_of(model)
    embedder = family.stretched(model, 3.0)
    module = family.embedder_of(model)
    held = SimpleNamespace(embedder=embedder)
    here.leaving = held
    try:
        expected = StretchHook()(module, (argument,), {}, module(argument))
        away = module.to("meta")(argument.to("meta"))
        found = StretchHook()(module, (argument.to("meta"),), {}, away)
    finally:
        here.leaving = None
    assert [(each.device, each.shape) for each in found] == [(each.device, each.shape) for each in away]
    assert {each.device for each in expected} == {tensor.device for tensor in embedder.buffers()} == {CPU}


def test_an_offloaded_model_is_restored():
    plain, model = tiny_flux(), tiny_flux()
    sequential(model, None)
    flexclear.transform(model, r=3, backend="sdpa")
    run(model)
    assert torch.equal(run(flexclear.restore(model)), run(plain))


def test_a_pipeline_s_model_offload_needs_an_accelerator(embedded):
    if torch.accelerator.is_available():
        pytest.skip("an accelerator is there: the GPU tests run it")
    with pytest.raises(RuntimeError, match="requires accelerator"):
        embedded.enable_model_cpu_offload()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible: diffusers refuses to offload")
@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_an_offloaded_pipeline_draws_what_it_draws_on_the_gpu(kind, events):
    def draw(pipe):
        return pipe(
            "a red apple on a blue background",
            num_inference_steps=2,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images

    expected = draw(flexclear.transform(flexclear.embedded.pipeline(device="cuda"), r=3)).cpu()
    pipe = flexclear.embedded.pipeline()
    if events == "transform first":
        flexclear.transform(pipe, r=3)
    if kind == "model":
        pipe.enable_model_cpu_offload()
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(
            onload_device=torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1
        )
    if events == "offload first":
        flexclear.transform(pipe, r=3)
    assert (draw(pipe).cpu() - expected).abs().max() <= 1e-3
