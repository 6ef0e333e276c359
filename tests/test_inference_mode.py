"""Under ``torch.inference_mode``, whose tensors have no version: read once, and never stale without a word."""

from __future__ import annotations

import pytest
import torch

import flexclear
from flexclear.runtime import grid

from helpers.models import flux_call, raster_ids, tiny_flux
from helpers.parallel_families import build
from helpers.reads import made_here, reads_of


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:flexclear. a reference image")
@pytest.mark.parametrize("kind", ["flux", "flux2", "sd3", "chroma, bool", "zimage, pads, two captions", "qwen"])
def test_only_the_first_step_reads_what_is_on_the_device(kind):
    model, call = build(kind)
    call = made_here(call)
    own = reads_of(model, call)
    flexclear.transform(model, r=3, backend="sdpa")
    assert reads_of(model, call) >= own
    assert [reads_of(model, call) for _ in range(3)] == [own] * 3


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["flux", "qwen", "chroma, bool"])
def test_on_cpu_what_was_changed_in_place_is_read_again(kind):
    model, call = build(kind)
    call = made_here(call)
    flexclear.transform(model, r=3, backend="sdpa")
    before = model(**call).sample
    name = {"flux": "img_ids", "qwen": "encoder_hidden_states_mask", "chroma, bool": "attention_mask"}[kind]
    changed = {
        "flux": lambda: raster_ids(20, 16),  # build's is 16 x 20
        "qwen": lambda: torch.ones(2, 12),
        "chroma, bool": lambda: torch.ones_like(call[name]),
    }[kind]()
    call[name].copy_(changed)
    ours = model(**call).sample
    assert (ours - before).abs().max() > 1e-3
    assert torch.equal(ours, model(**{**call, name: changed}).sample)


@pytest.fixture
def on_a_device(monkeypatch):
    """Tensors whose memory the host cannot look into."""
    monkeypatch.setattr(grid, "_is_in_host_memory", lambda tensor: False)


@torch.inference_mode()
@pytest.mark.usefixtures("on_a_device")
def test_on_a_device_a_stale_grid_gives_nan_and_then_an_error_and_a_new_tensor_works():
    model, call = flexclear.transform(tiny_flux(), r=3, backend="sdpa"), made_here(flux_call(12, 10, 16))
    before = model(**call).sample
    assert reads_of(model, call) == 0
    assert torch.equal(model(**call).sample, before)
    call["img_ids"].copy_(raster_ids(10, 12))
    assert model(**call).sample.isnan().all()
    with pytest.raises(RuntimeError, match=r"of shape \(120, 3\), torch.float32, were written to in place after"):
        model(**call)
    # The error was the word of it; the tensor is read anew.
    ours = model(**call).sample
    assert torch.equal(ours, model(**{**call, "img_ids": raster_ids(10, 12)}).sample)
    assert (ours - before).abs().max() > 1e-3


@torch.inference_mode()
@pytest.mark.usefixtures("on_a_device")
def test_on_a_device_a_write_of_the_same_numbers_changes_nothing():
    model, call = flexclear.transform(tiny_flux(), r=3, backend="sdpa"), made_here(flux_call(12, 10, 16))
    before = model(**call).sample
    call["img_ids"].copy_(raster_ids(12, 10))
    assert torch.equal(model(**call).sample, before)
    assert torch.equal(model(**call).sample, before)


@pytest.mark.parametrize("option", [{"down_factor": 2}, {"attention": "pixart"}], ids=str)
def test_weights_that_were_added_in_inference_mode_train(option):
    model = tiny_flux()
    with torch.inference_mode():
        flexclear.transform(model, backend="sdpa", **option)
    [weight] = [p for name, p in model.named_parameters() if name.startswith("transformer_blocks.0.attn.processor.")]
    model(**flux_call(8, 8, 3)).sample.sum().backward()
    assert weight.grad.abs().max() > 0
