"""Quantizing on the way to a device: the same result, from weights that need not fit it, and all of it or nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torchao.quantization

import flexclear
from flexclear.compile import quantize
from flexclear.compile.quantize import is_quantized
from flexclear.compile.recipes import why_not_recipe

from helpers.eight_bit import RECIPES, eight_bit, local, run

ELSEWHERE = "cpu:0"
"""To torch another device than "cpu", where there is no other."""


def interrupted(monkeypatch, after):
    """``quantize`` is interrupted once so many linears are done."""
    whole = torchao.quantization.quantize_

    def quantize_(model, config, filter_fn, device=None):
        seen = []

        def counted(module, name):
            if not filter_fn(module, name):
                return False
            seen.append(name)
            if len(seen) > after:
                raise KeyboardInterrupt
            return True

        whole(model, config, counted, device)

    monkeypatch.setattr(torchao.quantization, "quantize_", quantize_)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_that_is_moved_meanwhile_is_quantized_alike(base, recipe):
    model = local(base, down_factor=2)
    report = quantize(model, recipe, device=ELSEWHERE)
    expected = local(base, down_factor=2)
    assert report == quantize(expected, recipe)
    assert torch.equal(run(model), run(expected))


def test_optimize_hands_the_device_on(base):
    model = flexclear.optimize(local(base), fp8="int8", device=ELSEWHERE, backend="eager", compile=False)
    assert torch.equal(run(model), run(eight_bit(local(base), "int8")))


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_move_that_is_interrupted_leaves_the_model_as_it_was(base, monkeypatch, after):
    model = local(base, down_factor=2)
    expected, kept = run(model), dict(model.named_parameters())
    places = {name: parameter.data_ptr() for name, parameter in kept.items()}
    interrupted(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, "int8", device=ELSEWHERE)
    assert not is_quantized(model)
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    assert torch.equal(run(model), expected)
    monkeypatch.undo()
    assert torch.equal(run(eight_bit(model, "int8")), run(eight_bit(local(base, down_factor=2), "int8")))


def test_what_is_interrupted_in_place_says_how_far_it_has_come(base, monkeypatch):
    model = local(base)
    interrupted(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt) as raised:
        quantize(model, "int8")
    assert len(raised.value.__notes__) == 1
    assert raised.value.__notes__[0].startswith("flexclear: 3 of ")
    assert "Load the original weights" in raised.value.__notes__[0]
    monkeypatch.undo()
    interrupted(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt) as raised:
        quantize(local(base), "int8")
    assert not hasattr(raised.value, "__notes__"), "nothing was changed"


def test_a_device_is_refused_where_it_has_no_meaning(base):
    model = copy.deepcopy(base)
    with pytest.raises(ValueError, match=r"device='cuda' is where FP8 weights are made; .*pipe.to\('cuda'\)"):
        flexclear.optimize(model, device="cuda", backend="eager")
    with pytest.raises(ValueError, match=r"FP8 products need a CUDA device; this is 'cpu'\. This device"):
        flexclear.optimize(model, fp8="rowwise", device="cpu", backend="eager")
    pipe = flexclear.embedded.pipeline()
    with pytest.raises(ValueError, match=r"device='cpu' moves the transformer alone.*enable_model_cpu_offload"):
        flexclear.optimize(pipe, fp8="int8", device="cpu", sizes=[(64, 64)], min_features=16, backend="eager")
    assert not is_quantized(model)
    assert not is_quantized(pipe.transformer)


def test_weights_on_the_cpu_of_a_machine_with_a_gpu_are_told_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_not_recipe("rowwise", torch.device("cpu")).endswith("pass device='cuda'")
