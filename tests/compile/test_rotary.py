"""Rotary embedding in compiled blocks: real numbers, which the compiler fuses, equal to diffusers' complex ones."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

import flexclear
from flexclear.compile import compile_blocks
from flexclear.runtime.rotary import cos_and_sin, rotated

from helpers.models import flux_call, tiny_flux
from helpers.parallel_families import family


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosines_and_sines_turn_as_complex_numbers_do(dtype):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 300, 3, 128, generator=generator).to(dtype)
    angles = 1000 * torch.rand(300, 64, generator=generator)
    frequencies = torch.polar(torch.ones_like(angles), angles)
    cos, sin = (table.unsqueeze(1) for table in cos_and_sin(frequencies))
    ours, theirs = rotated(states, (cos, sin)), apply_rotary_emb_qwen(states, frequencies, use_real=False)
    assert ours.dtype is theirs.dtype is dtype
    # Two products and a sum, each rounded once, or fused: within one rounding of each product and of the sum.
    pairs = states.float().unflatten(-1, (-1, 2)).abs().sum(-1).repeat_interleave(2, -1)
    bound = 2 * torch.finfo(torch.float32).eps * pairs
    if dtype is not torch.float32:
        bound = bound + torch.finfo(dtype).eps * theirs.float().abs()  # and next to each other once rounded to it
    assert ((ours.float() - theirs.float()).abs() <= bound).all()


def qwen():
    cases = family("qwen")
    return cases.tiny_qwen(), cases.qwen_call((9, 13), ((5, 4),), 7)


def zimage():
    cases = family("zimage")
    # Its refiner of captions is dense, and diffusers' own: 16 tokens or so, in complex numbers.
    model = cases.tiny_zimage(axes_lens=[400, 64, 64])
    return model, cases.zimage_call(9, 13, (20,))


def flux():
    return tiny_flux(), flux_call(9, 13, 20)


def flux2():
    cases = family("flux2")
    return cases.tiny_flux2(), cases.flux2_call((9, 13), (), 20)


@pytest.mark.filterwarnings("ignore:flexclear. a reference image")
@pytest.mark.parametrize("make", [flux, flux2, qwen, zimage])
def test_no_windowed_block_computes_with_complex_numbers(make):
    graphs = []

    def keeping(graph, inputs):
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        graphs.append([value.dtype for value in values if isinstance(value, torch.Tensor)])
        return graph.forward

    model, call = make()
    flexclear.transform(model, r=3, backend="sdpa")
    compile_blocks(model, backend=keeping)
    with torch.no_grad():
        model(**call)
    complex_ones = [graph for graph in graphs if any(dtype.is_complex for dtype in graph)]
    assert graphs
    assert len(complex_ones) == (1 if make is zimage else 0)
