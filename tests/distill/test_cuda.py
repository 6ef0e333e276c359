"""Training on a GPU: compiled FlexAttention forward and backward against masked SDPA, and a run that goes on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

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
    ("changed", "dtype", "near"),
    [
        ({}, torch.float32, 1e-3),
        ({"down_factor": 2}, torch.float32, 1e-3),
        ({"train": "lora", "lora": LoraConfig(4, 8)}, torch.float32, 1e-3),
        ({"gradient_checkpointing": True, "gradient_accumulation": 2}, torch.float32, 1e-3),
        ({"mixed_precision": "bf16"}, torch.bfloat16, BFLOAT16),
    ],
    ids=["projections", "pooled", "lora", "checkpointing", "bfloat16"],
)
def test_compiled_attention_trains_what_masked_sdpa_trains(settings, chosen, changed, dtype, near):
    models, runs = {}, {}
    for backend in ("flex", "sdpa"):
        models[backend] = fresh(dtype)
        runs[backend] = distill(models[backend], settings(backend, **changed), samples())
        assert chosen == {(backend, "cuda")}
        chosen.clear()
    for ours, theirs in zip(values(runs["flex"].losses), values(runs["sdpa"].losses), strict=True):
        assert ours == pytest.approx(theirs, rel=near)
    first, last = runs["flex"].losses[0], runs["flex"].losses[-1]
    assert abs(first["loss"] - last["loss"]) > 1e-3, "nothing was learnt that could differ"
    pairs = zip(trained_parameters(models["flex"]).items(), trained_parameters(models["sdpa"]).values(), strict=True)
    for (name, ours), theirs in pairs:
        assert (ours - theirs).abs().max() <= near * theirs.abs().max().clamp_min(1e-3), name


def test_a_run_on_the_gpu_goes_on_as_if_it_had_not_stopped(settings):
    whole = distill(fresh(), settings("flex", "whole"), samples())
    split = settings("flex", "split")
    first = distill(fresh(), dataclasses.replace(split, steps=2), samples())
    second = distill(fresh(), split, samples())
    for ours, theirs in zip(values(first.losses + second.losses), values(whole.losses), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)  # the compiled backward adds in no fixed order
