"""Eight-bit weights beside windows and compilation, and the order of passes.

INT8 rounds activations anew in each layer, so that a difference of one last bit grows to the size of the rounding
itself within a few layers. Where both sides compute the same, equality is asked bit for bit; elsewhere a floor of SQNR.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import flexclear
from flexclear.compile import (
    compile_blocks,
    compile_whole,
    load_quantized,
    report,
    save_quantized,
    sqnr,
)

from helpers.eight_bit import FLOOR, RECIPES, WHY_NOT, eight_bit, local, pipeline, run

pytestmark = pytest.mark.filterwarnings(
    "ignore:TorchaoLoraLinear was instantiated", "ignore:Already found a `peft_conf"
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_eight_bit_blocks_give_the_output_of_uncompiled_ones(base, recipe, graphs):
    model = eight_bit(local(base), recipe)
    expected = run(model)
    before = report()
    compile_blocks(model, backend="eager")
    assert torch.equal(run(model), expected)
    assert len(report().since(before).graphs) == 2


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_windows_compiled_with_eight_bit_weights_equal_masked_attention(base, graphs):
    base = copy.deepcopy(base).float()
    base.transformer_blocks = torch.nn.ModuleList()  # one kind of block is enough, and half the time
    expected = run(eight_bit(local(base), "weight_only"), torch.float32)
    dense = run(eight_bit(copy.deepcopy(base), "weight_only"), torch.float32)
    assert (dense - expected).abs().max() > 1e-2, "the window makes no difference"
    model = eight_bit(local(base, backend="flex"), "weight_only")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
        compile_blocks(model)
        assert (run(model, torch.float32) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_windows_come_change_and_go_over_eight_bit_weights(base, recipe):
    plain = run(eight_bit(copy.deepcopy(base), recipe))
    first, second = (run(eight_bit(local(base, r=r), recipe)) for r in (3, 5))
    assert len({tuple(output.flatten().tolist()) for output in (plain, first, second)}) == 3
    model = eight_bit(local(base), recipe)
    assert torch.equal(run(model), first)
    assert torch.equal(run(flexclear.transform(model, r=5, backend="sdpa")), second)
    assert torch.equal(run(flexclear.restore(model)), plain)
    assert torch.equal(run(flexclear.transform(model, r=3, backend="sdpa")), first)


@pytest.mark.kept("compile_blocks")
@pytest.mark.parametrize("region", [compile_blocks, compile_whole])
def test_quantizing_and_transforming_after_compiling_compile_again(base, region, graphs):
    model = copy.deepcopy(base)
    region(model, backend="eager")
    dense = run(model)
    before = report()
    assert torch.equal(run(eight_bit(model, "weight_only")), run(eight_bit(copy.deepcopy(base), "weight_only")))
    flexclear.transform(model, r=3, backend="sdpa")
    assert torch.equal(run(model), run(eight_bit(local(base), "weight_only")))
    assert not torch.equal(run(model), dense)
    assert report().since(before).recompiles


@pytest.mark.kept
def test_a_lora_that_is_loaded_after_compiling_compiles_again_and_acts(base, files, graphs):
    theirs, ours = (pipeline(eight_bit(local(base), "weight_only")) for _ in range(2))
    compile_blocks(ours.transformer, backend="eager")
    quantized = run(ours)
    for pipe in (theirs, ours):
        pipe.load_lora_weights(files["first"])
    assert torch.equal(run(ours), run(theirs))
    ours.unload_lora_weights()
    assert torch.equal(run(ours), quantized)


def test_trained_weights_that_come_after_eight_bits_are_quantized_as_they_are_loaded(base, tmp_path):
    trained = local(base)
    for name, parameter in trained.named_parameters():
        if ".attn.to_q." in name:
            parameter.data.mul_(1.5)
    file = flexclear.save_weights(trained, tmp_path / "clear_local_3.safetensors")
    model = eight_bit(local(base), "weight_only")
    before = run(model)
    flexclear.load_weights(model, file)
    assert not torch.equal(run(model), before)
    right = local(base)
    flexclear.load_weights(right, file)
    right = eight_bit(right, "weight_only")
    assert torch.equal(run(model), run(right))
    assert sqnr(run(trained), run(right)) >= FLOOR["weight_only"]


def test_optimizing_twice_compiles_anew_and_refuses_a_second_quantizing(base, graphs):
    model = flexclear.optimize(local(base), fp8="weight_only", backend="eager")
    expected = run(model)
    assert torch.equal(expected, run(eight_bit(local(base), "weight_only")))
    with pytest.raises(ValueError, match=r"is already quantized: leave this pass out \(fp8=False\)"):
        flexclear.optimize(model, fp8="int8", compile=False, fuse_qkv=False)
    assert torch.equal(run(model), expected)
    hooks = len(model._forward_hooks)
    flexclear.optimize(model, backend="eager")
    assert torch.equal(run(model), expected)
    assert len(model._forward_hooks) == hooks


@pytest.mark.parametrize("recipe", RECIPES)
def test_projections_are_fused_before_they_are_quantized(base, recipe, tmp_path):
    expected = run(eight_bit(local(base), recipe))
    model = flexclear.optimize(local(base), fp8=recipe, fuse_qkv=True, compile=False)
    assert model.transformer_blocks[0].attn.fused_projections
    # Rows have scales of their own: fused or not, the eight-bit numbers are the same.
    assert torch.equal(run(model), expected)
    file = save_quantized(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"One of them has fused projections: model.fuse_qkv_projections\(\)"):
        load_quantized(local(base), file)
    late = eight_bit(local(base), recipe)
    with pytest.raises(ValueError, match="fuse_qkv comes before FP8"):
        flexclear.optimize(late, fuse_qkv=True, compile=False)
    assert torch.equal(run(late), expected)


def test_fused_projections_and_a_lora_that_they_would_leave_out_are_refused_together(base, files):
    pipe = pipeline(local(base))
    plain = run(pipe)
    pipe.load_lora_weights(files["first"])
    adapted = run(pipe)
    with pytest.raises(ValueError, match=r"fuse_qkv with a LoRA on .*to_q: fused projections would leave it out"):
        flexclear.optimize(pipe, fuse_qkv=True, compile=False)
    assert torch.equal(run(pipe), adapted)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    flexclear.optimize(pipe, fuse_qkv=True, compile=False)
    assert sqnr(adapted, run(pipe)) >= 35 > sqnr(plain, run(pipe))
    fused = run(pipe)
    pipe.load_lora_weights(files["third"])
    with pytest.raises(RuntimeError, match=r"a LoRA was loaded on .*to_q after its projections were fused"):
        run(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), fused)


def test_what_is_refused_for_its_options_changes_nothing(base):
    model = local(base)
    before = run(model)
    with pytest.raises(ValueError, match="no linear to quantize"):
        flexclear.optimize(model, fp8="weight_only", min_features=4096, fuse_qkv=True)
    assert not model.transformer_blocks[0].attn.fused_projections
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert torch.equal(run(model), before)
