"""Compiled blocks under hooks of diffusers and accelerate: around a block they run beside its graph, inside they are refused."""

from __future__ import annotations

import copy
import io

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading

import flexclear
from flexclear.compile import compile_blocks, quantize, repeated_blocks, report, uncompile
from flexclear.compile.blocks import hook_inside
from flexclear.compile.quantize import is_quantized

from helpers.eight_bit import CPU, RECIPES, eight_bit, local
from helpers.eight_bit import run as run_eight_bit
from helpers.models import flux_call, tiny_flux

STEPS = 4


def group(**options):
    return lambda model: apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **options)


def by_first_block(model):
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=0.3))


def by_magnitude(model):
    from diffusers import MagCacheConfig

    ratios = [1.0] * STEPS
    model.enable_cache(MagCacheConfig(num_inference_steps=STEPS, mag_ratios=ratios, threshold=0.3, retention_ratio=0.2))


def by_taylor(model):
    from diffusers import TaylorSeerCacheConfig

    model.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, max_order=1))


def by_broadcast(model):
    from diffusers import PyramidAttentionBroadcastConfig

    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
            current_timestep_callback=lambda: 500,
        )
    )


def by_casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


BLOCK_BY_BLOCK = group(offload_type="block_level", num_blocks_per_group=1)
AROUND = {
    "groups of one block": BLOCK_BY_BLOCK,
    "groups of two blocks": group(offload_type="block_level", num_blocks_per_group=2),
    "first block cache": by_first_block,
    "magnitude cache": by_magnitude,
}
WHOLE = {"whole model": lambda model: accelerate.cpu_offload_with_hook(model, execution_device=CPU)}
INSIDE = {
    "groups of leaves": (group(offload_type="leaf_level"), r"\(group_offloading\) is on norm1.linear"),
    "sequential": (
        lambda model: accelerate.cpu_offload(model, execution_device=CPU),
        r"\(AlignDevicesHook\) is on norm1.linear",
    ),
    "layerwise casting": (by_casting, r"\(layerwise_casting\) is on attn.to_q"),
    "pyramid attention broadcast": (by_broadcast, r"\(pyramid_attention_broadcast\) is on attn"),
    "taylor seer": (by_taylor, r"\(taylorseer_cache\) is on attn"),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def transformed(**config):
    return flexclear.transform(tiny_flux(**config), r=3, backend="sdpa")


ONE_KIND = {"num_single_layers": 0}
"""Of blocks, where a second kind, traced in each test, would show nothing new."""


def steps(model):
    """Outputs of a run of denoising steps whose input drifts."""
    outputs = []
    for step in range(STEPS):
        call = flux_call(9, 13, 20)
        call["hidden_states"] = call["hidden_states"] * (1 - 0.02 * step)
        call["timestep"] = torch.full((1,), 1 - 0.1 * step)
        with torch.no_grad(), model.cache_context("cond"):
            outputs.append(model(**call).sample)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("kind", "compiled_already"), [("groups of one block", False), *((kind, True) for kind in (*AROUND, *WHOLE))]
)
def test_a_hook_around_blocks_runs_beside_their_graphs(kind, compiled_already):
    plain, model = transformed(), transformed()
    hook = {**AROUND, **WHOLE}[kind]
    hook(plain)
    expected, before = steps(plain), report()
    flexclear.optimize(model, backend="eager")
    if compiled_already:
        steps(model)
    hook(model)
    assert (steps(model) - expected).abs().max() <= 1e-5
    assert len(report().since(before).graphs) == 2, "one for each kind of block, as without hooks"
    assert (steps(uncompile(model)) - steps(plain)).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", INSIDE)
def test_a_hook_inside_a_block_is_refused_in_the_call_and_runs_uncompiled(kind):
    hook, names = INSIDE[kind]
    plain, model = transformed(**ONE_KIND), transformed(**ONE_KIND)
    hook(plain)
    flexclear.optimize(model, backend="eager")
    steps(model)
    hook(model)
    with pytest.raises(RuntimeError, match=rf"a hook {names} of a compiled FluxTransformerBlock .*uncompile\(model\)"):
        steps(model)
    model = uncompile(model)
    if hasattr(model, "_reset_stateful_cache"):
        model._reset_stateful_cache()
    assert (steps(model) - steps(plain)).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", [*AROUND, *INSIDE])
def test_compiling_under_hooks_is_refused_with_the_order_that_works_and_changes_nothing(kind):
    model = local(tiny_flux(num_attention_heads=4, attention_head_dim=64, axes_dims_rope=(16, 24, 24)))
    AROUND.get(kind, INSIDE.get(kind, (None,))[0])(model)
    with pytest.raises(ValueError, match=r"a hook .* of transformer_blocks.0 .*Compile first: flexclear.optimize"):
        flexclear.optimize(model, fp8="weight_only", backend="eager")
    with pytest.raises(ValueError, match="Compile first"):
        compile_blocks(model, backend="eager")
    assert not is_quantized(model)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_a_forward_that_somebody_has_put_on_a_block_is_not_compiled_away():
    model = transformed()
    block = model.transformer_blocks[1]
    block.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=r"transformer_blocks.1 .* was given a forward of its own"):
        flexclear.optimize(model, backend="eager")
    del block.forward
    flexclear.optimize(model, backend="eager")


@pytest.mark.parametrize("recipe", RECIPES)
def test_eight_bit_weights_are_quantized_compiled_and_then_offloaded(base, recipe):
    model = local(base)
    expected = run_eight_bit(eight_bit(copy.deepcopy(model), recipe))
    flexclear.optimize(model, fp8=recipe, backend="eager")
    BLOCK_BY_BLOCK(model)
    for _ in range(2):
        assert torch.equal(run_eight_bit(model), expected)


def test_blocks_are_compiled_again_once_their_hooks_are_gone():
    plain, model = transformed(**ONE_KIND), transformed(**ONE_KIND)
    expected = steps(plain)
    flexclear.optimize(model, backend="eager")
    by_first_block(model)
    steps(model)
    model.disable_cache()
    before = report()
    assert (steps(model) - expected).abs().max() <= 1e-5
    assert report().since(before).graphs == ()
    flexclear.optimize(model, backend="eager")
    assert (steps(model) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_compiled_blocks_are_plain_and_have_their_own_weights(way):
    model = transformed(**ONE_KIND)
    compile_blocks(model, backend="eager")
    expected = steps(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    before = report()
    assert (steps(other) - expected).abs().max() <= 1e-5
    assert report().since(before).graphs == ()
    for theirs, ours in zip(repeated_blocks(other), repeated_blocks(model), strict=True):
        assert theirs._compiled_call_impl is None
        assert theirs.forward.__self__ is theirs
        assert ours.forward.__wrapped__.__self__ is ours
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not steps(other).any()
    assert torch.equal(steps(model), expected)
    compile_blocks(other, backend="eager")
    assert not steps(other).any()


def test_nothing_inside_a_plain_block_is_taken_for_a_hook():
    model = transformed()
    assert all(hook_inside(block) is None for block in repeated_blocks(model))
    quantize(
        model := local(tiny_flux(num_attention_heads=4, attention_head_dim=64, axes_dims_rope=(16, 24, 24))), "int8"
    )
    assert all(hook_inside(block) is None for block in repeated_blocks(model))
