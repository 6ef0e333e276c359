"""Padded text: keys that no query may see, per sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from flexclear.compile import compiled_flex_attention, why_not_compiled
from flexclear.masks import Disc, Layout, block_mask, dense_mask, with_text_mask
from flexclear.testing.lists import blocks_of, listed_blocks
from flexclear.testing.strategies import block_sizes, layouts_with_windows


def kept(batch, text_len, seed=0):
    """Some text tokens at random, so that the first may be padding and so may the last."""
    return torch.rand(batch, text_len, generator=torch.Generator().manual_seed(seed)) > 0.4


@given(
    layouts_with_windows(side=st.integers(1, 20), most_references=1), block_sizes, st.integers(1, 3), st.integers(0, 5)
)
def test_padded_text_is_seen_by_nobody_and_all_else_stays(drawn, block_size, batch, seed):
    layout, window = drawn
    keep = kept(batch, layout.text_len, seed)
    mask = with_text_mask(block_mask(layout, window, block_size=block_size, text_padded=True), layout, keep)
    plain = dense_mask(layout, window)
    expected = plain.expand(batch, *plain.shape).clone()
    start = 0 if layout.text_first else layout.image_len
    for sample in range(batch):
        for token in range(layout.text_len):
            if not keep[sample, token]:
                expected[sample, :, start + token] = False
    assert torch.equal(with_text_mask(plain, layout, keep)[:, 0], expected)
    queries, keys = torch.arange(plain.shape[0])[:, None], torch.arange(plain.shape[1])[None, :]
    for sample in range(batch):
        assert torch.equal(mask.mask_mod(torch.tensor(sample), torch.tensor(0), queries, keys), expected[sample])
        blocks = blocks_of(expected[sample], mask.BLOCK_SIZE)
        full = listed_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, blocks.shape[1])
        partial = listed_blocks(mask.kv_num_blocks, mask.kv_indices, blocks.shape[1])
        assert blocks[full].all()
        assert not (blocks.any(-1).any(-1) & ~full & ~partial).any()


@pytest.mark.kept
@pytest.mark.skipif(
    why_not_compiled(torch.device("cpu")) is not None, reason=str(why_not_compiled(torch.device("cpu")))
)
def test_attention_drops_padding_and_prompts_cost_no_graph():
    generator = torch.Generator().manual_seed(0)
    graphs = set()
    for batch, layout in [
        (3, Layout(9, 13, 20)),
        (4, Layout(20, 15, 90)),
        (4, Layout(20, 15, 90)),
        (5, Layout(17, 19, 70)),
        (5, Layout(17, 16, 70, text_first=False)),
        (3, Layout(30, 14, 50)),
        (3, Layout(12, 14, 50, text_first=False)),
    ]:
        keep = kept(batch, layout.text_len, seed=len(graphs))
        mask = with_text_mask(block_mask(layout, Disc(3), text_padded=True), layout, keep)
        dense = with_text_mask(dense_mask(layout, Disc(3)), layout, keep)
        query, key, value = (torch.randn(batch, 2, layout.seq_len, 16, generator=generator) for _ in range(3))
        with torch.no_grad():
            ours = compiled_flex_attention(query, key, value, mask)
        theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=dense)
        assert (ours - theirs).abs().max() <= 1e-5
        graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) <= 3, "sizes and prompts share a graph once sizes have changed, one where text is last"


@pytest.mark.parametrize(
    "keep", [torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 4), torch.ones(4, dtype=torch.bool)]
)
def test_a_mask_of_another_shape_or_type_is_named(keep):
    layout = Layout(4, 4, 4)
    with pytest.raises(ValueError, match=r"keep must be bool of shape \[batch, 4\], got torch\."):
        with_text_mask(dense_mask(layout, Disc(2)), layout, keep)
