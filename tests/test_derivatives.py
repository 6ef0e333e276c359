"""Forward-mode AD and torch.func on transformed models, against stock ones under the dense mask and SDPA's plain kernel."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, functionalize, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import flexclear
from flexclear.compile import UnfusedAttentionError, compiled_flex_attention
from flexclear.compile.derivatives import transforms_in_force
from flexclear.masks import Disc, Layout, block_mask, dense_mask
from flexclear.runtime.hooks import entry_hook_of
from flexclear.runtime.plan import plans

from helpers import parallel_families
from helpers.models import flux_call, tiny_flux

SIZES = {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
CALL = flux_call(9, 13, 20)
LATENTS = CALL["hidden_states"]
DIRECTION = torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(1))
MASK = {"attention_mask": dense_mask(Layout(9, 13, 20, order="raster"), Disc(3))}


def function_of(model, **extra):
    """The model as a function of its latents."""
    return lambda latents: model(**{**CALL, **extra, "hidden_states": latents}).sample


def dual(f, x, t):
    """Forward-mode AD as trainers use it: no graph, and the tangent read off the output."""
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


def loss_of(f):
    return lambda x: f(x).square().mean()


TRANSFORMS = {
    "dual tensors": dual,
    "jvp": lambda f, x, t: jvp(f, (x,), (t,))[1],
    "jvp without a graph": lambda f, x, t: torch.no_grad()(jvp)(f, (x,), (t,))[1],
    "vjp": lambda f, x, t: vjp(f, x)[1](t)[0],
    "grad": lambda f, x, t: grad(loss_of(f))(x),
    "vmap": lambda f, x, t: vmap(f)(torch.stack([x, t])),
    "vmap of jvp": lambda f, x, t: vmap(lambda t: jvp(f, (x,), (t,))[1])(torch.stack([x, t])),
    "jvp of grad": lambda f, x, t: jvp(grad(loss_of(f)), (x,), (t,))[1],
    "grad of grad": lambda f, x, t: grad(lambda x: (grad(loss_of(f))(x) * t).sum())(x),
    "functionalize": lambda f, x, t: functionalize(f)(x),
}


@pytest.mark.parametrize(("name", "order"), [*((name, "tiled") for name in TRANSFORMS), ("dual tensors", "raster")])
def test_a_derivative_is_that_of_the_original_under_the_dense_mask(name, order):
    transform, model = TRANSFORMS[name], tiny_flux(num_layers=1, num_single_layers=1, **SIZES).requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH):
        expected = transform(function_of(model, joint_attention_kwargs=MASK), LATENTS, DIRECTION)
        dense = transform(function_of(model), LATENTS, DIRECTION)
    plans.clear()
    found = transform(function_of(flexclear.transform(model, r=3, order=order)), LATENTS, DIRECTION)
    # Rounding of float32 over sums of 64 and 137 terms; the window matters fifty times as much.
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (dense - expected).abs().max() > 1e-3 * expected.abs().max()


def test_tangents_of_weights_are_those_of_the_original():
    model = tiny_flux(num_layers=1, num_single_layers=1, **SIZES).requires_grad_(False)
    weights = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(2)
    tangents = {name: 0.01 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}

    def of_weights(weights, **extra):
        return functional_call(model, weights, (), {**CALL, **extra}).sample

    with sdpa_kernel(SDPBackend.MATH):
        expected = jvp(lambda given: of_weights(given, joint_attention_kwargs=MASK), (weights,), (tangents,))[1]
    flexclear.transform(model, r=3)
    assert (jvp(of_weights, (weights,), (tangents,))[1] - expected).abs().max() <= 2e-5 * expected.abs().max()
    with torch.no_grad(), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(weight, tangents[name]) for name, weight in weights.items()}
        found = forward_ad.unpack_dual(of_weights(duals)).tangent
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


FAMILIES = (
    "flux with references",
    "flux2",
    "sd3.5 with residuals",
    "chroma, float",
    "zimage, pads, two captions",
    "qwen",
)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_has_tangents(kind):
    model, call = parallel_families.build(kind)
    name = "x" if "x" in call else "hidden_states"
    latents = torch.stack(call[name]) if name == "x" else call[name]
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))

    def of_latents(latents):
        given = list(latents.unbind(0)) if name == "x" else latents
        sample = model(**{**call, name: given}).sample
        return torch.stack(sample) if name == "x" else sample

    with sdpa_kernel(SDPBackend.MATH):
        expected = dual(of_latents, latents, direction)
    flexclear.transform(model, r=200)  # sees everything
    assert (dual(of_latents, latents, direction) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_z_image_is_not_functionalized():
    model, call = parallel_families.build("zimage, no pads")
    flexclear.transform(model, r=3)
    with pytest.raises(ValueError, match=r"ZImageTransformer2DModel under torch.func.functionalize"):
        functionalize(lambda x: torch.stack(model(**{**call, "x": list(x.unbind(0))}).sample))(torch.stack(call["x"]))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("dual tensors", "forward-mode AD"),
        ("jvp", r"torch\.func \(jvp\)"),
        ("vmap of jvp", r"torch\.func \(vmap, jvp\)"),
        ("grad", r"torch\.func \(grad\)"),
        ("functionalize", r"torch\.func \(functionalize\)"),
    ],
)
def test_flex_refuses_what_it_has_no_rule_for(name, named):
    model = flexclear.transform(tiny_flux(), r=3, backend="flex")
    with pytest.raises(ValueError, match=rf"backend='flex' cannot run .* runs under {named}\. backend='auto' would"):
        TRANSFORMS[name](function_of(model), LATENTS, DIRECTION)


def test_compiled_attention_by_itself_refuses_tangents():
    layout = Layout(9, 13, 20)
    query = torch.randn(1, 2, layout.seq_len, 64)
    mask = block_mask(layout, Disc(3))
    for name in ("dual tensors", "jvp", "vmap"):
        with pytest.raises(UnfusedAttentionError, match="has a backward pass at most, but was called under"):
            TRANSFORMS[name](lambda query: compiled_flex_attention(query, query, query, mask), query, query)


def test_what_has_no_tangent_keeps_its_kernel_while_another_thread_differentiates():
    with forward_ad.dual_level():
        assert transforms_in_force([LATENTS, torch.arange(3)]) is None
        assert transforms_in_force([LATENTS, forward_ad.make_dual(LATENTS, DIRECTION)]) == "forward-mode AD"


@pytest.mark.parametrize("name", ["grad", "jvp", "functionalize"])
def test_plans_made_under_a_transform_serve_plain_calls(name):
    model = flexclear.transform(tiny_flux(**SIZES), r=3, backend="sdpa", proportional_attention=True)
    flexclear.runtime.switches._gain.cache_clear()
    plans.clear()
    TRANSFORMS[name](function_of(model), LATENTS, DIRECTION)
    left = function_of(model)(LATENTS)
    left.mean().backward()
    flexclear.runtime.switches._gain.cache_clear()
    plans.clear()
    assert torch.equal(function_of(model)(LATENTS), left)


def test_compiled_blocks_are_refused_by_name():
    model = flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for name, named in (("dual tensors", "forward-mode AD"), ("grad", r"torch\.func \(grad\)")):
        with pytest.raises(
            RuntimeError, match=rf"{named} does not reach through the compiled .*uncompile\(model\) first"
        ):
            TRANSFORMS[name](function_of(model), LATENTS, DIRECTION)
    flexclear.compile.uncompile(model)
    assert dual(function_of(model), LATENTS, DIRECTION).abs().max() > 0.1


def test_several_ranks_refuse_them():
    model = flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    entry_hook_of(model).parallel = Mock()
    for name, named in (("dual tensors", "forward-mode AD"), ("vmap", r"torch\.func \(vmap\)")):
        with pytest.raises(ValueError, match=f"several ranks is for inference, and this call runs under {named}"):
            TRANSFORMS[name](function_of(model), LATENTS, DIRECTION)


def test_tangents_that_get_lost_inside_the_model_are_missed():
    model = flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    # As Inductor's kernels do: torch.compile(model) stands around the model, where no hook of its own sees it.
    model.proj_out.register_forward_hook(lambda module, args, output: forward_ad.unpack_dual(output).primal)
    with pytest.raises(RuntimeError, match="tangents passed to this FluxTransformer2DModel have no effect"):
        dual(function_of(model), LATENTS, DIRECTION)
