"""torch.compile of a whole transformed FLUX: equal results, few graphs, attention that stays fused."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

import flexclear
from flexclear.compile import why_not_compiled
from flexclear.masks import Disc, Layout, dense_mask

from helpers.models import flux_call, tiny_flux

CPU = torch.device("cpu")
SIZES = [(9, 13), (12, 10), (16, 16), (7, 20)]


def by_function(model, **options):
    return torch.compile(model, **options)


def by_method(model, **options):
    model.compile(**options)
    return model


def by_blocks(model, **options):
    model.compile_repeated_blocks(**options)
    return model


@pytest.fixture
def pair():
    """A model of one block each, and its twin to be transformed."""
    torch.compiler.reset()
    original = tiny_flux(num_layers=1, num_single_layers=1, num_attention_heads=1)
    yield original, copy.deepcopy(original)
    torch.compiler.reset()


def differences(original, compiled, sizes=SIZES):
    """Greatest difference from the dense mask per size."""
    found = []
    for height, width in sizes:
        call = flux_call(height, width, 20)
        mask = dense_mask(Layout(height, width, 20, order="raster"), Disc(3))
        with torch.no_grad():
            expected = original(**call, joint_attention_kwargs={"attention_mask": mask}).sample
            found.append((compiled(**call).sample - expected).abs().max().item())
    return found


# The eager backend runs what Dynamo traced as it is: graphs and guards are the real ones, and no kernel is built.
@pytest.mark.parametrize("how", [by_function, by_method, by_blocks])
def test_a_compiled_transformed_model_gives_the_same_from_two_graphs_per_part(pair, how):
    original, model = pair
    compiled = how(flexclear.transform(model, r=3, backend="sdpa"), fullgraph=True, backend="eager")
    before, broken = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    assert max(differences(original, compiled)) <= 1e-4
    # One for the first size, one for all others; whole models are one part, the two kinds of blocks are two.
    assert 1 <= counters["stats"]["unique_graphs"] - before <= (4 if how is by_blocks else 2)
    assert sum(counters["graph_break"].values()) == broken


@pytest.mark.kept
@pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))
def test_attention_stays_fused_in_a_compiled_model(monkeypatch):
    torch.compiler.reset()
    operator = importlib.import_module("torch._higher_order_ops.flex_attention")
    unfused, math_attention = [], operator.math_attention
    monkeypatch.setattr(operator, "math_attention", lambda *args: (unfused.append(args), math_attention(*args))[1])
    flex_attention(*torch.randn(3, 1, 1, 16, 16))
    assert len(unfused) == 1, "this does not notice unfused attention"
    original = tiny_flux(num_layers=0, num_single_layers=1, num_attention_heads=1)
    model = flexclear.transform(copy.deepcopy(original), r=3, backend="flex")
    compiled = by_method(model, fullgraph=True, dynamic=True)
    before = counters["stats"]["unique_graphs"]
    assert max(differences(original, compiled, [(16, 16), (12, 22), (15, 17)])) <= 1e-4
    assert len(unfused) == 1
    assert counters["stats"]["unique_graphs"] - before == 1
    torch.compiler.reset()


def test_a_pipeline_s_compiled_transformer_draws_the_same(embedded):
    from diffusers import FluxPipeline

    parts = {**embedded.components, "transformer": copy.deepcopy(embedded.transformer)}
    pipe = FluxPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe(
            "a red apple on a blue background",
            height=96,
            width=128,
            num_inference_steps=2,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images

    flexclear.transform(pipe, r=3, backend="sdpa")
    expected = draw()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert (draw() - expected).abs().max() <= 1e-5


def test_a_model_that_is_compiled_already_is_refused_with_the_right_order():
    with pytest.raises(TypeError, match="Transform first, then compile"):
        flexclear.transform(torch.compile(tiny_flux(), backend="eager"))


def test_transforming_and_restoring_a_model_compiled_in_place_reach_its_graphs(pair):
    original, model = pair
    by_method(model, backend="eager")
    call = flux_call(9, 13, 20)
    with torch.no_grad():
        dense = original(**call).sample
        assert (model(**call).sample - dense).abs().max() <= 1e-5
        flexclear.transform(model, r=3, backend="sdpa")
        assert max(differences(original, model, SIZES[:1])) <= 1e-4
        flexclear.restore(model)
        assert (model(**call).sample - dense).abs().max() <= 1e-5
