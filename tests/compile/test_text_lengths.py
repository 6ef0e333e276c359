"""Prompts of every length run in the graphs of the first one, equal to the model that is not compiled."""

from __future__ import annotations

import copy

import pytest
import torch

import flexclear
from flexclear.compile import compile_blocks, repeated_blocks, report, why_not_compiled

from helpers.models import flux_call, tiny_flux
from helpers.parallel_families import family

CPU = torch.device("cpu")
HEIGHT, WIDTH = 12, 16
LENGTHS = [20, 21, HEIGHT * WIDTH, 32, 2, 3, 5, 7, 11, 13, 33, 47, 64, 77, 100, 128, 129, 150, 200, 257]
HEAD_64 = {"num_attention_heads": 1, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}


def chroma():
    cases = family("chroma")
    return cases.tiny_chroma(), lambda length: cases.chroma_call(HEIGHT, WIDTH, length, 2, kind="float")


def flux():
    return tiny_flux(), lambda length: flux_call(HEIGHT, WIDTH, length, 2)


def flux2():
    cases = family("flux2")
    return cases.tiny_flux2(), lambda length: cases.flux2_call((HEIGHT, WIDTH), (), length)


def sd3():
    cases = family("sd3")
    return cases.tiny_sd3(), lambda length: cases.sd3_call(HEIGHT, WIDTH, length)


def qwen():
    cases = family("qwen")
    return cases.tiny_qwen(), lambda length: cases.qwen_call((HEIGHT, WIDTH), (), length)


def qwen_padded():
    cases = family("qwen")

    def call(length):
        mask = torch.ones(2, length)
        mask[1, -1] = 0
        return cases.qwen_call((HEIGHT, WIDTH), (), length, 2, mask=mask)

    return cases.tiny_qwen(), call


def zimage():
    cases = family("zimage")
    return cases.tiny_zimage(axes_lens=[400, 64, 64]), lambda length: cases.zimage_call(HEIGHT, WIDTH, (length,))


MODELS = {
    "flux": flux,
    "flux2": flux2,
    "sd3": sd3,
    "chroma": chroma,
    "qwen": qwen,
    "qwen, padded": qwen_padded,
    "zimage": zimage,
}


@pytest.fixture(autouse=True)
def graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run(model, call):
    with torch.no_grad():
        found = model(**call).sample
        return torch.stack(found) if isinstance(found, list) else found


def check(compiled, plain, call, kinds):
    """Twenty lengths: each equal, and at most two graphs for each kind of block, all of the first length."""
    before = report()
    for number, length in enumerate(LENGTHS):
        # float32 throughout: sums of up to 449 products of size 1 in another order.
        assert (run(compiled, call(length)) - run(plain, call(length))).abs().max() <= 1e-5, length
        new = report().since(before).graphs
        if number == 0:
            first = new
            blocks = [graph for graph in new if graph.function.startswith("forward (")]
            assert 1 <= len(blocks) <= 2 * kinds
        assert new == first, (length, [graph.cause for graph in new[len(first) :]])


@pytest.mark.kept("flux", "qwen, padded")
# The eager backend runs what Dynamo traced as it is: graphs and guards are the real ones, and no kernel is built.
@pytest.mark.parametrize("kind", MODELS)
def test_twenty_text_lengths_need_the_graphs_of_one(kind):
    model, call = MODELS[kind]()
    pooled = {"down_factor": 2} if kind == "flux" else {}
    flexclear.transform(model, r=3, backend="flex" if why_not_compiled(CPU) is None else "sdpa", **pooled)
    plain = flexclear.transform(MODELS[kind]()[0], r=3, backend="sdpa", **pooled)
    compile_blocks(model, backend="eager")
    # Z-Image's one class of block is three: for the image, for captions, for both.
    check(model, plain, call, 3 if kind == "zimage" else len({type(block) for block in repeated_blocks(model)}))


@pytest.mark.kept("flux")
@pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))
@pytest.mark.parametrize("kind", ["qwen", "flux"])
def test_kernels_of_one_text_length_serve_twenty(kind):
    if kind == "qwen":
        model = family("qwen").tiny_qwen(num_layers=1, **HEAD_64)
        call = qwen()[1]
    else:
        model = tiny_flux(num_layers=0, num_single_layers=1, **HEAD_64)

        def call(length):
            return flux_call(HEIGHT, WIDTH, length)

    plain = flexclear.transform(copy.deepcopy(model), r=3, backend="sdpa")
    compile_blocks(flexclear.transform(model, r=3, backend="flex"))
    check(model, plain, call, 1)


@pytest.mark.parametrize("region", ["blocks", "whole"])
def test_a_model_that_is_not_transformed_is_compiled_once_for_all_lengths(region):
    model, call = qwen() if region == "whole" else qwen_padded()
    plain = copy.deepcopy(model)
    flexclear.optimize(model, compile=region, backend="eager")
    for length in LENGTHS[:6]:
        before = report()
        assert (run(model, call(length)) - run(plain, call(length))).abs().max() <= 1e-5
        assert length == LENGTHS[0] or report().since(before).graphs == ()


def test_gradients_reach_through_blocks_that_are_compiled_for_all_lengths():
    model = tiny_flux()
    plain = flexclear.transform(copy.deepcopy(model), r=3, backend="sdpa")
    compile_blocks(flexclear.transform(model, r=3, backend="sdpa"), backend="eager")
    for length in LENGTHS[:2]:
        for each in (model, plain):
            each.zero_grad()
            each(**flux_call(HEIGHT, WIDTH, length, 2)).sample.square().sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4), name


def test_warmed_sizes_compile_nothing_for_real_prompts_and_dense_steps(embedded_copy):
    pipe = embedded_copy
    flexclear.transform(pipe, r=3, dense_steps=(1, 1), backend="sdpa")
    flexclear.optimize(pipe, sizes=[(96, 128)], backend="eager", progress=False)
    before = report()
    for prompt, length in (("a red apple", 16), ("two green leaves on a table", 32), ("a blue cup", 48)):
        pipe(prompt, height=96, width=128, num_inference_steps=3, max_sequence_length=length, output_type="latent")
    assert report().since(before).graphs == ()


def test_a_warmed_qwen_image_pipeline_compiles_nothing_for_prompts_and_negative_prompts(monkeypatch):
    pipe = family("qwen").pipeline("QwenImagePipeline")

    def encoded(prompt, *args, **kwargs):
        # As the real one for a single prompt: five tokens of the template and those of the words, none of them padding.
        return torch.randn(1, 5 + len(prompt.split()), 12), None

    monkeypatch.setattr(pipe, "encode_prompt", encoded)
    flexclear.transform(pipe, r=3, backend="sdpa")
    flexclear.optimize(pipe, sizes=[(48, 64)], backend="eager", progress=False)
    before = report()
    for prompt in ("a red apple", "a very long prompt " * 40, "tea"):
        pipe(prompt, negative_prompt=" ", true_cfg_scale=4.0, height=48, width=64, num_inference_steps=2)
    assert report().since(before).graphs == ()


@pytest.fixture
def embedded_copy():
    from diffusers import FluxPipeline

    parts = dict(flexclear.embedded.pipeline().components)
    pipe = FluxPipeline(**{**parts, "transformer": copy.deepcopy(parts["transformer"])})
    pipe.set_progress_bar_config(disable=True)
    return pipe
