"""Training on a GPU: compiled FlexAttention forward and backward against masked SDPA, and a run that goes on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate.state import AcceleratorState

from flexclear.distill import distill
from flexclear.distill.config import LoraConfig
from flexclear.distill.students import trained_parameters
from flexclear.runtime import hooks

from helpers.distill_cases import config
from helpers.distill_samples import random_samples
from helpers.models import tiny_flux

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("any_precision"),
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device is visible: compiled attention trains there"
    ),
]

NEAR = 1e-3
BFLOAT16 = 2**-7  # what its last bit is worth


def fresh(dtype=torch.float32):
    return tiny_flux(attention_head_dim=32, axes_dims_rope=(8, 12, 12), num_single_layers=3).to(dtype)


def samples():
    """Images of 20 x 16 tokens, so that there are skipped blocks beside whole and partial ones."""
    return random_samples(10, height=40, width=32)


@pytest.fixture
def settings(tmp_path):
    """Settings of a short run on the GPU, in a folder of its own."""

    def make(backend, output="run", **changed):
        return config(tmp_path / backend / output, device=None, backend=backend, **changed)

    return make


@pytest.fixture
def chosen(monkeypatch):
    """Collects the backends of calls with gradients, and their devices."""
    found = set()
    original = hooks.choose_backend

    def choose(wanted, device, dtype, needs_grad, transforms):
        backend = original(wanted, device, dtype, needs_grad, transforms)
        if needs_grad:
            found.add((backend, device.type))
        return backend

    monkeypatch.setattr(hooks, "choose_backend", choose)
    return found


def values(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"down_factor": 2},
        {"train": "lora", "lora": LoraConfig(4, 8)},
        {"gradient_checkpointing": True, "gradient_accumulation": 2},
    ],
    ids=["projections", "pooled", "lora", "checkpointing"],
)
def test_compiled_attention_trains_what_masked_sdpa_trains(settings, chosen, changed):
    models, runs = {}, {}
    for backend in ("flex", "sdpa"):
        models[backend] = fresh()
        runs[backend] = distill(models[backend], settings(backend, **changed), samples())
        assert chosen == {(backend, "cuda")}
        chosen.clear()
    for ours, theirs in zip(values(runs["flex"].losses), values(runs["sdpa"].losses), strict=True):
        assert ours == pytest.approx(theirs, rel=NEAR)
    first, last = runs["flex"].losses[0], runs["flex"].losses[-1]
    assert abs(first["loss"] - last["loss"]) > 1e-3, "nothing was learnt that could differ"
    pairs = zip(trained_parameters(models["flex"]).items(), trained_parameters(models["sdpa"]).values(), strict=True)
    for (name, ours), theirs in pairs:
        assert (ours - theirs).abs().max() <= NEAR * theirs.abs().max().clamp_min(1e-3), name


def test_in_bfloat16_it_is_as_near_to_float32_as_masked_sdpa_is(settings, chosen):
    """Not to masked SDPA in bfloat16: on an H100 the norm of that one's gradients was 3 % from float32's, and ours 1 %."""
    trained, runs = {}, {}
    for name, dtype, backend in (
        ("exact", torch.float32, "sdpa"), ("flex", torch.bfloat16, "flex"), ("sdpa", torch.bfloat16, "sdpa")
    ):  # fmt: skip
        model = fresh(torch.bfloat16).to(dtype)
        precision = "no" if dtype == torch.float32 else "bf16"
        AcceleratorState._reset_state(True)
        runs[name] = values(distill(model, settings(backend, name, mixed_precision=precision), samples()).losses)
        assert chosen == {(backend, "cuda")}
        chosen.clear()
        trained[name] = {key: value.detach().float() for key, value in trained_parameters(model).items()}

    def furthest(run, name):
        return max(abs(one[name] / exact[name] - 1) for one, exact in zip(runs[run], runs["exact"], strict=True))

    for name in ("loss", "flow", "prediction", "attention", "gradient_norm"):
        assert furthest("flex", name) <= furthest("sdpa", name) + BFLOAT16, (name, runs)
    for name, value in trained["exact"].items():
        theirs = (trained["sdpa"][name] - value).abs().max()
        assert (trained["flex"][name] - value).abs().max() <= theirs + BFLOAT16 * value.abs().max(), name


def test_a_run_on_the_gpu_goes_on_as_if_it_had_not_stopped(settings):
    whole = distill(fresh(), settings("flex", "whole"), samples())
    split = settings("flex", "split")
    first = distill(fresh(), dataclasses.replace(split, steps=2), samples())
    second = distill(fresh(), split, samples())
    for ours, theirs in zip(values(first.losses + second.losses), values(whole.losses), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)  # the compiled backward adds in no fixed order
