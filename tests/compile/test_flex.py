"""Compiled FlexAttention equals masked SDPA, stays compiled, and says so when it cannot."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from flexclear.compile import UnfusedAttentionError, compiled_flex_attention, why_not_compiled
from flexclear.masks import Disc, Downsampled, Layout, Square, Swin, block_mask, dense_mask
from flexclear.masks.cpu import PACKED_TYPES
from flexclear.runtime.attention import choose_backend, windowed_attention
from flexclear.testing import assert_matches_dense
from flexclear.testing.strategies import layouts, radii

HEADS, HEAD_DIM = 2, 16
CPU = torch.device("cpu")

needs_compiler = pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))


def attention_inputs(layout, dtype=torch.float32, batch=1):
    generator = torch.Generator().manual_seed(layout.seq_len)
    shape = (3, batch, HEADS, layout.seq_len, HEAD_DIM)
    return torch.randn(shape, generator=generator).to(dtype).unbind()


def both(layout, r, dtype=torch.float32, batch=1):
    query, key, value = attention_inputs(layout, dtype, batch)
    with torch.no_grad():
        ours = compiled_flex_attention(query, key, value, block_mask(layout, Disc(r)))
    mask = dense_mask(layout, Disc(r))
    return ours.float(), F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask)


@needs_compiler
@settings(max_examples=40)
@given(layouts(), radii)
@example(Layout(17, 23, 77), 5)
def test_compiled_attention_equals_masked_sdpa_in_float32(layout, r):
    # Sequences of one block are graphs of their own (Dynamo specializes sizes of 1); the next test has one.
    assume(layout.seq_len > 128)
    ours, reference = both(layout, r)
    assert (ours - reference).abs().max() <= 1e-5


@needs_compiler
def test_compiled_attention_equals_masked_sdpa_on_a_sequence_of_one_block():
    ours, reference = both(Layout(5, 7, text_len=3), 3)
    assert (ours - reference).abs().max() <= 1e-5


@needs_compiler
@settings(max_examples=10)
@given(layouts(side=st.integers(10, 30)), radii)
def test_compiled_attention_is_as_near_to_float32_as_bfloat16_allows(layout, r):
    assume(layout.seq_len > 128)
    ours, reference = both(layout, r, torch.bfloat16)
    query, key, value = attention_inputs(layout, torch.bfloat16)
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(layout, Disc(r))).float()
    error, rounding = ((x - reference).norm() / reference.norm() for x in (ours, dense))
    assert error <= 2 * rounding + 1e-3, (error, rounding)


@needs_compiler
def test_fifty_resolutions_and_many_radii_share_one_graph():
    both(Layout(16, 16, text_len=32), 4)
    before = counters["stats"]["unique_graphs"]
    for step in range(50):
        ours, reference = both(Layout(12 + step % 23, 40 - step % 29, text_len=32 + step), 2 + step % 7)
        assert (ours - reference).abs().max() <= 1e-5
    assert counters["stats"]["unique_graphs"] == before


@needs_compiler
def test_families_of_windows_are_graphs_of_their_own_and_their_parameters_are_not():
    layouts = [Layout(16, 16, text_len=32), Layout(12, 25, text_len=40)]
    for family in ([Square(3), Square(5)], [Swin(4, 2), Swin(6)], [Downsampled(Disc(3), 4), Downsampled(Disc(6), 3)]):
        counts = []
        for layout, window in itertools.product(layouts, family):
            # Blocks that are not square: else there are as many of queries as of keys until pooled keys fill one of their own,
            # and Dynamo compiles in that two lengths are one.
            assert_matches_dense(layout, window, block_size=(128, 64))
            counts.append(counters["stats"]["unique_graphs"])
        assert len(set(counts)) == 1, (family, counts)


@needs_compiler
@pytest.mark.parametrize("switch", ["disable", "force_eager"])
def test_attention_that_would_run_unfused_raises(switch):
    layout = Layout(16, 16, text_len=32)
    query, key, value = attention_inputs(layout)
    mask = block_mask(layout, Disc(4))
    stopped = (
        torch._dynamo.config.patch(disable=True) if switch == "disable" else torch.compiler.set_stance("force_eager")
    )
    with stopped, pytest.raises(UnfusedAttentionError, match=r"without torch.compile.*288 x 288.*backend='sdpa'"):
        compiled_flex_attention(query, key, value, mask)
    with torch.no_grad():
        assert compiled_flex_attention(query, key, value, mask).shape == query.shape, (
            "and it is compiled again afterwards"
        )


def with_a_python_value(name):
    return lambda b, h, q, k: q >= k if len(name) % 2 else q <= k


@needs_compiler
def test_the_recompile_limit_raises_and_says_how_to_go_on():
    layout = Layout(16, 16, text_len=32)
    query, key, value = attention_inputs(layout)

    def attend(name):
        return compiled_flex_attention(query, key, value, block_mask(layout, with_a_python_value(name)))

    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        attend("one")
        with pytest.raises(UnfusedAttentionError, match=r"recompile limit \(1\) is reached.*capture 0-d tensors"):
            attend("four")


def test_the_backend_is_chosen_by_device_type_and_gradients():
    assert choose_backend("sdpa", CPU, torch.float32, False) == "sdpa"
    assert choose_backend("auto", CPU, torch.float32, True) == "sdpa"
    assert choose_backend("auto", CPU, torch.float64, False) == "sdpa"
    assert choose_backend("auto", torch.device("meta"), torch.float32, False) == "sdpa"
    if why_not_compiled(CPU) is None:
        assert choose_backend("auto", CPU, torch.bfloat16, False) == "flex"
        with pytest.raises(ValueError, match=r"backend='flex' cannot run.*on CPU it has no backward pass"):
            choose_backend("flex", CPU, torch.float32, True)
        with pytest.raises(ValueError, match=r"the model computes in torch.float64"):
            choose_backend("flex", CPU, torch.float64, False)


def test_masked_sdpa_has_gradients_that_float64_confirms():
    layout = Layout(3, 4, text_len=2)
    mask = dense_mask(layout, Disc(2))
    inputs = [t.double().requires_grad_() for t in attention_inputs(layout)]
    assert torch.autograd.gradcheck(lambda q, k, v: windowed_attention(q, k, v, mask), inputs)


@needs_compiler
@pytest.mark.parametrize("batch", [1, 2])
def test_slices_of_a_fused_projection_are_read_where_they_begin_in_a_compiled_block(batch):
    layout = Layout(9, 13, 20)
    mask = block_mask(layout, Disc(3))
    tokens = torch.randn(batch, layout.seq_len, HEADS * HEAD_DIM)
    fused = torch.nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)

    def projected():
        query, key, value = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in fused(tokens).chunk(3, dim=-1))
        return query * 1.1, key * 0.9, value

    def block():
        return compiled_flex_attention(*projected(), mask)

    with torch.no_grad():
        ours = torch.compile(block, fullgraph=True)()
        reference = F.scaled_dot_product_attention(*projected(), attn_mask=dense_mask(layout, Disc(3)))
    assert (ours - reference).abs().max() <= 1e-5


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_where_the_cpu_has_no_packed_products(dtype):
    if dtype in PACKED_TYPES:
        pytest.skip(f"this CPU multiplies {dtype} by AMX")
    layout = Layout(16, 16, text_len=32)
    query, key, value = (tokens.to(dtype) for tokens in attention_inputs(layout))
    with torch.no_grad():
        found = compiled_flex_attention(query, key, value, block_mask(layout, Disc(4)))
    right = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=dense_mask(layout, Disc(4))
    )
    assert found.dtype == dtype
    # Half a unit in the last place of the result, and float32's own error, which is far below.
    assert ((found.double() - right).abs() <= 0.51 * torch.finfo(dtype).eps * right.abs() + 1e-6).all()
