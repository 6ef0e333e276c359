"""Blocks are compiled once for all; sizes, recompiles and their causes are counted; nothing falls back.

Graphs are traced by Dynamo and run eagerly here (``backend="eager"``): what is counted is the same, in seconds.
"""

from __future__ import annotations

import copy
import logging
from argparse import Namespace

import pytest
import torch

import flexclear
from flexclear.compile import compile_blocks, compile_whole, regional, repeated_blocks, report, uncompile

from helpers.models import flux_call, tiny_flux, tiny_flux2, tiny_qwen
from helpers.models_joint_video import tiny_hunyuan_video
from helpers.models_video import tiny_ltx2

SIZES = [(16, 24), (20, 18), (33, 17)]


@pytest.fixture
def blocks():
    """How many blocks of each kind the model has: tracing a whole one takes a second for each."""
    return 1


@pytest.fixture
def model(blocks):
    torch.compiler.reset()
    yield flexclear.transform(made(blocks), r=3, backend="flex")
    torch.compiler.reset()


def made(blocks):
    return tiny_flux(num_layers=blocks, num_single_layers=blocks)


def run(model, height, width, text_len=20):
    with torch.no_grad():
        return model(**flux_call(height, width, text_len)).sample


def run_all(model, sizes):
    for height, width in sizes:
        run(model, height, width)


def expected(height, width, text_len=20, blocks=1):
    return run(flexclear.transform(made(blocks), r=3, backend="sdpa"), height, width, text_len)


@pytest.mark.parametrize("blocks", [2])
def test_equal_blocks_share_their_graphs_and_a_size_seen_before_costs_none(model, blocks):
    compile_blocks(model, backend="eager")
    counts = []
    for height, width in [*SIZES, SIZES[0]]:
        before = report()
        assert (run(model, height, width) - expected(height, width, blocks=blocks)).abs().max() <= 1e-5
        counts.append(len(report().since(before).graphs))
    assert max(counts[:3]) <= 2  # two kinds of blocks
    assert counts[3] == 0


def test_dynamic_graphs_serve_every_size(model):
    compile_blocks(model, dynamic=True, backend="eager")
    run(model, *SIZES[0])
    before = report()
    for height, width in SIZES[1:]:
        assert (run(model, height, width) - expected(height, width)).abs().max() <= 1e-5
    assert report().since(before).graphs == ()


@pytest.mark.kept("blocks")
@pytest.mark.parametrize("region", ["blocks", "whole"])
def test_one_size_more_than_there_is_room_for_raises_and_says_what_makes_room(model, region):
    flexclear.optimize(model, compile=region, backend="eager", max_sizes=2)
    run_all(model, SIZES[:2])
    with pytest.raises(RuntimeError, match=r"max_sizes=2 .* 1 x 561 .* larger max_sizes, or dynamic=True"):
        run(model, *SIZES[2])
    assert (run(model, *SIZES[0]) - expected(*SIZES[0])).abs().max() <= 1e-5
    before = report()
    run(model, *SIZES[1], text_len=7)
    assert report().since(before).graphs == ()


def test_where_dynamo_makes_no_more_graphs_the_error_says_what_makes_room(model):
    flexclear.transform(model, r=3, backend="sdpa")
    compile_blocks(model, backend="eager", max_sizes=1)
    with (
        torch._dynamo.config.patch(accumulated_recompile_limit=1, recompile_limit=1),
        pytest.raises(RuntimeError, match=r"no more graphs for FluxTransformerBlock.*max_sizes, or dynamic=True"),
    ):
        run(model, *SIZES[0]), model(**flux_call(*SIZES[0], 20))


@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_nothing_to_compile_with_is_said_before_anything_is_changed(model, monkeypatch, backend):
    monkeypatch.setattr(regional, "why_no_cpp_compiler", lambda: "no C++ compiler was found")
    if backend == "eager":
        flexclear.optimize(model, backend=backend)
        return
    with pytest.raises(ValueError, match=r"torch.compile cannot run on cpu: no C\+\+ compiler.*compile=False"):
        flexclear.optimize(model, backend=backend)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_the_report_names_functions_times_and_causes(model):
    compile_blocks(model, backend="eager")
    before = report()
    run(model, *SIZES[0])
    run(model, *SIZES[1])
    new = report().since(before)
    assert {graph.function.split(" ")[0] for graph in new.graphs} == {"forward"}
    assert all(graph.seconds > 0 and not graph.failure for graph in new.graphs)
    assert any("size mismatch" in graph.cause for graph in new.recompiles)
    text = str(new)
    assert f"{len(new.graphs)} graphs in" in text
    assert "again: " in text


def test_uncompiled_blocks_run_as_python_again(model):
    compile_blocks(model, backend="eager")
    assert all(block._compiled_call_impl is not None for block in repeated_blocks(model))
    uncompile(model)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_a_model_without_a_list_of_block_classes_is_compiled_by_its_stacks():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8, in_channels=4, out_channels=4,
    ).eval()  # fmt: skip
    assert not getattr(model, "_repeated_blocks", None)
    assert repeated_blocks(model) == list(model.transformer_blocks)
    plain = copy.deepcopy(model)
    call = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 8),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
    }
    compile_blocks(model, backend="eager")
    with torch.no_grad():
        assert torch.allclose(model(**call).sample, plain(**call).sample, atol=1e-6)


def test_a_whole_model_is_one_region(model):
    compile_whole(model, backend="eager")
    before = report()
    assert (run(model, *SIZES[0]) - expected(*SIZES[0])).abs().max() <= 1e-5
    assert len(report().since(before).graphs) == 1


def test_optimize_compiles_and_logs_what_an_unseen_size_costs(model, caplog):
    assert flexclear.optimize(model, backend="eager") is model
    with caplog.at_level(logging.INFO, "flexclear"):
        run(model, *SIZES[0])
        assert "FluxTransformer2DModel compiled" in caplog.text
        assert "first call of forward" in caplog.text
        caplog.clear()
        run(model, *SIZES[1])
        assert "size mismatch" in caplog.text
        caplog.clear()
        run(model, *SIZES[0])
        assert "compiled" not in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"mode": "fast"}, ValueError, r"mode must be one of \['default'.*got 'fast'"),
        ({"compile": "all"}, ValueError, r"compile must be True, False or one of \['blocks', 'whole'\], got 'all'"),
        ({"fp8": "fp4"}, ValueError, r"recipe must be one of .*got 'fp4'"),
        ({"fp8": True}, ValueError, r"FP8 products need a CUDA device.*can run \['weight_only'"),
        ({"fp8": 8}, ValueError, "fp8 must be True, False or one of"),
        ({"sizes": [(64, 64)]}, ValueError, "sizes and vae need the pipeline, not its transformer alone"),
        ({"max_sizes": 0}, ValueError, "max_sizes must be an int >= 1, got 0"),
        ({"max_sizes": True}, ValueError, "max_sizes must be an int >= 1, got True"),
        ({"sizes": [64]}, ValueError, r"sizes must be \(height, width\) pairs in pixels, got 64"),
        ({"sizes": [(64.0, 64)]}, ValueError, r"got \(64.0, 64\)"),
    ],
)
def test_a_bad_option_is_named_and_changes_nothing(model, kwargs, error, message):
    if torch.cuda.is_available() and kwargs == {"fp8": True}:
        pytest.skip("this machine may have FP8")
    with pytest.raises(error, match=message):
        flexclear.optimize(model, **kwargs)
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert not model._forward_hooks or all(
        "CompileWatch" not in type(h).__name__ for h in model._forward_hooks.values()
    )


@pytest.mark.parametrize("make", [tiny_qwen, tiny_hunyuan_video, tiny_flux2])
def test_projections_are_fused_or_it_says_that_none_can_be(make):
    model = make()
    if make is not tiny_flux2:
        with pytest.raises(
            ValueError, match=f"diffusers fuses no projections of a {type(model).__name__}; leave fuse_qkv out"
        ):
            flexclear.optimize(model, fuse_qkv=True)
    else:
        flexclear.optimize(model, fuse_qkv=True, compile=False)
    fused = [module for module in model.modules() if getattr(module, "fused_projections", False)]
    assert len(fused) == (2 if make is tiny_flux2 else 0)


def test_a_model_that_diffusers_cannot_fuse_is_left_as_it_was():
    model = tiny_ltx2()
    with pytest.raises(ValueError, match=r"diffusers cannot fuse the projections of this LTX2.*Leave fuse_qkv out"):
        flexclear.optimize(model, fuse_qkv=True, compile=False)
    assert not any(getattr(module, "fused_projections", False) for module in model.modules())
    assert not any("to_qkv" in name or "to_kv" in name for name in model.state_dict())


def test_a_pipeline_without_a_vae_is_named_before_anything_is_compiled(model):
    pipe = Namespace(transformer=model, vae=None)
    with pytest.raises(ValueError, match=r"this Namespace has none \(vae is a NoneType\)\. Leave vae out"):
        flexclear.optimize(pipe, vae=True)
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.parametrize(("call", "message"), [({"max_sizes": 0}, "max_sizes must be an int >= 1, got 0")])
def test_bad_room_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        compile_blocks(model, **call)


def test_a_model_without_blocks_is_named():
    with pytest.raises(ValueError, match="Linear has no repeated transformer blocks"):
        compile_blocks(torch.nn.Linear(2, 2))
