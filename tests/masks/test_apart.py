"""Text queries apart: the image's lists against the dense reference, attention against masked SDPA, and what refuses it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from flexclear.compile import why_not_compiled
from flexclear.compile.kernels import Kernel
from flexclear.masks import Both, Disc, Downsampled, Full, Layout, Neighborhood, Square, block_mask, dense_mask
from flexclear.masks.apart import TextApart, can_part, text_apart
from flexclear.runtime.attention import windowed_attention
from flexclear.runtime.plan import build_plan
from flexclear.testing.sequence import check_apart
from flexclear.testing.strategies import block_sizes

CPU = torch.device("cpu")
flex = pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))

windows = st.one_of(
    st.builds(Disc, st.integers(1, 40)),
    st.builds(Square, st.integers(1, 9)),
    st.builds(Neighborhood, st.integers(1, 3)),
    st.builds(Both, st.builds(Disc, st.integers(1, 9)), st.builds(Square, st.integers(1, 9))),
    st.just(Full()),
)
drawn_layouts = st.builds(
    Layout,
    st.integers(3, 24),
    st.integers(3, 24),
    st.integers(1, 300),
    st.booleans(),
    st.sampled_from(["tiled", "raster"]),
)


@given(drawn_layouts, windows, block_sizes)
def test_image_rows_see_what_the_dense_reference_says(layout, window, block_size):
    found, dense = text_apart(layout, window, block_size=block_size), dense_mask(layout, window)
    check_apart(layout, window, dense, found.image.BLOCK_SIZE)
    places = torch.arange(layout.seq_len)
    assert torch.equal(found.mask_mod(None, None, places[:, None], places[None, :]), dense)


@flex
def test_attention_equals_masked_sdpa_and_sizes_share_a_graph():
    generator, graphs = torch.Generator().manual_seed(0), []
    layouts = (
        Layout(9, 13, 20), Layout(20, 15, 200), Layout(24, 17, 128), Layout(16, 16, 77),
        Layout(24, 17, 40, text_first=False),
    )  # fmt: skip
    for layout in layouts:
        plan = build_plan(
            layout, Disc(5), "flex", Kernel((64, 64), coordinates="computed", text_apart=True), CPU, False
        )
        assert isinstance(plan.mask, TextApart)
        query, key, value = torch.randn(3, 2, 2, layout.seq_len, 64, generator=generator).unbind()
        with torch.no_grad():
            ours = windowed_attention(query, key, value, plan.mask)
        theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(layout, Disc(5)))
        assert ours.shape == query.shape
        # Sums of 64 products and of some 400 weights, in two orders, each within a few units in the last place.
        assert (ours - theirs).abs().max() <= 4e-6
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) <= 3, "one more for the second size, one for text that comes last"


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": Downsampled(Disc(3), 2)},
        {"layout": Layout(9, 12, 0)},
        {"backward": True},
        {"text_padded": True},
        {"kernel": Kernel((128, 128), text_apart=False)},
        {"window": lambda batch, head, q, kv: q >= kv},
    ],
    ids=["pooled keys", "no text", "backward", "padded text", "one call", "a mask_mod"],
)
def test_elsewhere_it_is_one_mask(arguments):
    default = {
        "layout": Layout(9, 12, 40), "window": Disc(3), "backend": "flex", "kernel": Kernel((128, 128), text_apart=True),
        "device": CPU, "backward": False,
    }  # fmt: skip
    assert isinstance(build_plan(**default).mask, TextApart)
    facts = {**default, **arguments}
    if not can_part(facts["layout"], facts["window"]):
        with pytest.raises(ValueError, match="text cannot be attended apart under"):
            text_apart(facts["layout"], facts["window"], block_size=64)
    if hasattr(facts["window"], "name"):
        assert not isinstance(build_plan(**facts).mask, TextApart)


def test_a_plan_in_two_parts_takes_no_padding():
    plan = build_plan(Layout(9, 12, 40), Disc(3), "flex", Kernel((64, 64), text_apart=True), CPU, False)
    with pytest.raises(TypeError, match="was not built for padded text"):
        plan.masked(torch.ones(1, 40, dtype=torch.bool))


def list_bytes(mask):
    return sum(
        getattr(mask, name).numel() * 4
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    )


def test_lists_of_16384_px_on_a_gpu_take_40_megabytes_and_grow_with_the_image(monkeypatch):
    # "meta" stands for a GPU: lists are built on CPU and then moved.
    sizes = {}
    for side in (256, 512, 1024):
        found = text_apart(Layout(side, side), Disc(16), block_size=(64, 64), device="meta", coordinates="packed")
        sizes[side] = list_bytes(found.image)
    assert sizes[1024] <= 40e6
    assert sizes[1024] <= 4.2 * sizes[512] <= 4.2 * 4.2 * sizes[256]
    whole = block_mask(Layout(256, 256), Disc(16), block_size=(64, 64), device="meta")
    assert list_bytes(whole) > 8 * sizes[256]


def test_a_sequence_without_text_has_lists_as_narrow_on_a_gpu():
    layout, kernel = Layout(512, 512, 0), Kernel((64, 64), text_apart=True)
    plan = build_plan(layout, Disc(16), "flex", kernel, torch.device("meta"), False)
    assert list_bytes(plan.mask) <= 2e6
    on_cpu = build_plan(Layout(24, 24, 0), Disc(2), "flex", kernel, CPU, False).mask
    assert on_cpu.kv_indices.shape[-1] == 9, "the CPU's kernel takes the width for the number of blocks"
