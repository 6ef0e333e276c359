"""What ``transform`` makes of a FLUX beyond the contract of all families: plans that are kept, positions, graphs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch._dynamo.utils import counters

import flexclear
from flexclear.compile import why_not_compiled
from flexclear.compile.kernels import Kernel
from flexclear.masks import Disc, Layout, dense_mask
from flexclear.runtime.plan import plans
from flexclear.runtime.processors import windowed
from flexclear.runtime.switches import Switches

from helpers.models import flux_call, raster_ids, tiny_flux

CPU = torch.device("cpu")
BACKENDS = [
    "sdpa",
    pytest.param(
        "flex", marks=pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))
    ),
]


@pytest.fixture
def model():
    return tiny_flux()


def masked(model, call, height, width, r):
    """The stock model under the dense boolean mask, in raster order."""
    mask = dense_mask(Layout(height, width, call["encoder_hidden_states"].shape[1], order="raster"), Disc(r))
    with torch.no_grad():
        return model(**call, joint_attention_kwargs={"attention_mask": mask}).sample


def run(model, call):
    with torch.no_grad():
        return model(**call).sample


@pytest.mark.parametrize("backend", BACKENDS)
def test_resolutions_may_alternate_and_come_back_to_the_same_block_mask(model, backend):
    original = copy.deepcopy(model)
    flexclear.transform(model, r=4, backend=backend)
    plans.clear()
    shapes = [(64, 64), (48, 85), (64, 64)]  # 1024 x 1024, 768 x 1360 and 1024 x 1024 px
    outputs = []
    for height, width in shapes:
        call = flux_call(height, width, 16)
        outputs.append(run(model, call))
        assert (outputs[-1] - masked(original, call, height, width, 4)).abs().max() <= 1e-4
    assert torch.equal(outputs[0], outputs[2])
    assert (plans.stats().misses, plans.stats().hits) == (2, 1)


@pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))
def test_prompts_radii_and_ten_resolutions_compile_nothing_new(model):
    flexclear.transform(model, r=3, backend="flex")
    run(model, flux_call(16, 16, 32))
    before = counters["stats"]["unique_graphs"]
    run(model, flux_call(16, 16, 32, seed=1))
    for step in range(10):
        flexclear.transform(model, r=2 + step, backend="flex")
        run(model, flux_call(10 + step, 31 - 2 * step, 32))
    assert counters["stats"]["unique_graphs"] == before


def test_a_saved_model_loads_as_the_original(model, tmp_path):
    call = flux_call(16, 16, 32)
    dense = run(model, call)
    flexclear.transform(model, r=3).save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path), call), dense)


@pytest.mark.parametrize(("height", "width"), [(300, 20), (20, 300), (512, 512)])
def test_positions_above_256_stay_exact_although_bfloat16_rounds_the_ids(height, width):
    from flexclear.runtime.grid import read_grids

    ids = raster_ids(height, width, torch.bfloat16)
    exact = raster_ids(height, width, torch.float32)
    assert len(ids.unique(dim=0)) < len(exact), "these ids are not rounded"
    assert read_grids(ids) == read_grids(exact) == ((height, width),)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert read_grids(ids) == read_grids(exact) == ((height, width),)
    finally:
        torch.set_default_dtype(torch.float32)
    seen = {}
    model = tiny_flux(num_layers=0, num_single_layers=1)
    flexclear.transform(model, r=1, order="raster", backend="sdpa")
    entry = next(iter(model._forward_pre_hooks.values()))
    call = {
        "hidden_states": torch.empty(1, height * width, 8, device="meta"),
        "encoder_hidden_states": torch.empty(1, 4, 12, device="meta"),
        "img_ids": ids,
    }
    plan = PlanWithoutMask(height, width)
    for exact_ids in (True, False):
        seen[exact_ids] = entry.family.enter(model, call, plan, exact_ids, Switches())[0]["img_ids"]
    assert torch.equal(seen[True], exact)
    assert torch.equal(seen[False], ids)


class PlanWithoutMask:
    """The part of a plan that ids go through; a dense mask over 512 x 512 tokens would be 69 GB."""

    def __init__(self, height, width):
        _, y, x = Layout(height, width, order="raster").coordinates()
        self.base = SimpleNamespace(rows=y.float(), columns=x.float())

    def to_image_order(self, tokens, dim=1):
        return tokens


@pytest.mark.parametrize(
    "given", ["hidden_states", "encoder_hidden_states", "pooled_projections", "controlnet_block_samples"]
)
def test_a_frozen_model_is_differentiated_by_whatever_it_is_given(given):
    frozen = tiny_flux(num_layers=2, num_single_layers=0).requires_grad_(False)
    call = {**flux_call(8, 8, 16), "controlnet_block_samples": [torch.randn(1, 64, 32)]}
    entered = call[given][0] if given == "controlnet_block_samples" else call[given]
    entered.requires_grad_()
    gradients = []
    for backend in ("auto", "sdpa"):
        flexclear.transform(frozen, r=3, backend=backend)
        gradients += torch.autograd.grad(frozen(**call).sample.square().mean(), [entered])
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_ids_changed_in_place_are_read_again(model):
    call = flux_call(6, 8, 4)
    flexclear.transform(model, r=2, backend="sdpa")
    run(model, call)
    call["img_ids"].copy_(raster_ids(8, 6))
    expected = run(model, {**call, "img_ids": raster_ids(8, 6)})
    assert torch.equal(run(model, call), expected)


def test_every_attention_layer_is_replaced(model):
    flexclear.transform(model, r=2)
    assert {type(p) for p in model.attn_processors.values()} == {windowed(FluxAttnProcessor)}
    assert len(model.attn_processors) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_counts_every_byte_it_holds(backend):
    from flexclear.runtime.plan import get_plan

    plans.clear()
    layout = Layout(12, 20, 16)
    plan = get_plan(layout, Disc(3), backend, Kernel((128, 64)), CPU)
    n, index_bytes = layout.seq_len, 2 * 8 * layout.image_len + 2 * 4 * layout.image_len
    if backend == "sdpa":
        mask_bytes = n * n
    else:
        rows, columns = -(-n // 128), -(-n // 64)
        mask_bytes = 2 * 4 * (rows + rows * columns) + 4 * (1 << 16) + 4
    assert plans.stats().bytes == sum(t.numel() * t.element_size() for t in plan.tensors())
    assert plans.stats().bytes >= index_bytes + mask_bytes


def test_a_plan_made_in_inference_mode_serves_training_afterwards(model):
    plans.clear()
    call = flux_call(12, 10, 16)
    flexclear.transform(model, r=3, backend="sdpa")
    with torch.inference_mode():
        inferred = model(**call).sample
    trained = model(**call).sample
    trained.square().mean().backward()
    assert (plans.stats().hits, plans.stats().misses) == (1, 1)
    assert torch.allclose(trained, inferred, atol=1e-6)


def test_a_default_device_does_not_reach_masks_and_plans():
    from flexclear.masks import block_mask, cost
    from flexclear.runtime.plan import build_plan

    layout = Layout(9, 13, 7)
    expected = block_mask(layout, Disc(3))
    with torch.device("meta"):
        ours, spent = block_mask(layout, Disc(3)), cost(layout, Disc(3))
        plan = build_plan(layout, Disc(3), "flex", Kernel((128, 64)), CPU, backward=True)
        assert dense_mask(layout, Disc(3)).device == CPU
    assert torch.equal(ours.kv_indices, expected.kv_indices)
    assert spent == cost(layout, Disc(3))
    assert {tensor.device for tensor in plan.tensors()} == {CPU}


@torch.no_grad()
def test_an_attention_module_that_was_exchanged_is_found():
    model, plain = flexclear.transform(tiny_flux(), r=3, backend="sdpa"), tiny_flux()
    call = flux_call(8, 8, 5)
    model(**call)
    model.transformer_blocks[1].attn = plain.transformer_blocks[1].attn
    with pytest.raises(
        RuntimeError, match=r"transformer_blocks\.1\.attn of this transformed .* was given a FluxAttnProc"
    ):
        model(**call)


@torch.no_grad()
def test_processors_are_found_in_a_block_that_a_wrapper_holds():
    model, call = flexclear.transform(tiny_flux(), r=3, backend="sdpa"), flux_call(8, 8, 5)
    before = model(**call).sample
    block = model.transformer_blocks[1]
    model.transformer_blocks[1] = torch.compile(block, backend="eager")
    assert (model(**call).sample - before).abs().max() <= 1e-5
    block.attn.set_processor(type(tiny_flux().transformer_blocks[1].attn.processor)())
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.1\.attn of this transformed"):
        model(**call)


def test_forward_hooks_of_the_caller_see_the_output_in_raster_order(model):
    seen = []

    def keep(module, args, output):
        seen.append(output.sample.clone())

    model.register_forward_hook(keep)
    flexclear.transform(model, r=3, backend="sdpa")
    model.register_forward_hook(keep)
    for r in (3, 4):
        flexclear.transform(model, r=r, backend="sdpa")
        output = run(model, flux_call(9, 13, 7))
        assert all(torch.equal(one, output) for one in seen[-2:])
    assert len(seen) == 4
    flexclear.restore(model)
    assert len(model._forward_hooks) == 2


def test_autocast_leaves_a_float64_model_its_type(model):
    call = {name: value.double() for name, value in flux_call(9, 13, 7).items()}
    flexclear.transform(model.double(), r=3)
    expected = run(model, call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(model, call), expected)
