"""What is told of attention is what whole attention maps say, in every token order and under every mask."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import flexclear
from flexclear.alternatives import properties
from flexclear.analysis import attention as module
from flexclear.analysis import attention_pictures, observe
from flexclear.analysis.perturb import Clip, clipped_distances

from helpers.models import flux_call, tiny_flux
from helpers.models_joint_video import tiny_hunyuan_video

LAYERS = ["transformer_blocks.1.attn", "single_transformer_blocks.0.attn"]


def whole_map(model, call, layer):
    """``[heads, N, N]``, text first, then raster order, by the probing that measures alternatives."""
    return properties.attention_map(properties.capture(model, call, layer))


@pytest.mark.parametrize("at_once", [1 << 23, 300])
@pytest.mark.parametrize(("r", "order"), [(None, "raster"), (None, "tiled"), (3, "tiled"), (3, "raster")])
def test_curves_and_maps_are_those_of_whole_attention_maps(monkeypatch, r, order, at_once):
    monkeypatch.setattr(module, "MAX_NUMBERS", at_once)
    height, width, text_len = 9, 13, 5
    model, call = tiny_flux(), flux_call(height, width, text_len)
    flexclear.transform(model, r, backend="sdpa", order=order)
    queries = [(0, 0), (8, 12), (4, 6)]
    with torch.no_grad(), observe(model, LAYERS, queries=queries) as found:
        model(**call)
    assert [one.layer for one in found] == LAYERS
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = ((y.flatten()[:, None] - y.flatten()) ** 2 + (x.flatten()[:, None] - x.flatten()) ** 2).double().sqrt()
    for one in found:
        expected = whole_map(model, call, one.layer)[:, text_len:]
        assert list(one.maps) == queries
        for row, column in queries:
            own = expected[:, row * width + column, text_len:].view(-1, height, width)
            assert (one.maps[row, column] - own).abs().max() <= 1e-5
        assert (one.text_share - expected[..., :text_len].sum((1, 2)) / (height * width)).abs().max() <= 1e-5
        for number in range(len(one.uniform)):
            there = (distance >= number) & (distance < number + 1)
            mass = expected[..., text_len:][:, there].sum(1) / expected[..., text_len:].sum((1, 2))
            assert (one.mass[:, number] - mass).abs().max() <= 1e-5
            assert one.uniform[number] == pytest.approx(there.double().mean().item())
        assert one.mass.sum(1).tolist() == pytest.approx([1, 1])
        if r is not None:
            assert one.within(r) == pytest.approx(1)
        else:
            assert one.within(3) < 0.9


def test_a_layer_is_in_one_block_at_a_time_and_free_after_it():
    model, call = flexclear.transform(tiny_flux(), None, backend="sdpa", order="raster"), flux_call(8, 6, 5)
    with torch.no_grad(), observe(model, LAYERS) as outer:
        for another in (observe(model, LAYERS[1:]), clipped_distances(model, Clip("remote", 2))):
            with pytest.raises(ValueError, match=r"\.attn is inside another block of flexclear.analysis"), another:
                pass
        model(**call)
    assert [one.layer for one in outer] == LAYERS
    with torch.no_grad(), observe(model, LAYERS) as again:
        model(**call)
    assert len(again) == len(LAYERS)


def test_masks_by_rule_say_the_same_as_dense_ones():
    from flexclear.masks import Disc, Layout, block_mask, dense_mask

    layout = Layout(9, 13, 5)
    queries = torch.tensor([0, 7, 100])
    by_rule = module._rows_of(block_mask(layout, Disc(3)), queries, layout.seq_len)
    assert torch.equal(by_rule, dense_mask(layout, Disc(3))[queries])
    assert torch.equal(module._rows_of(dense_mask(layout, Disc(3)), queries, layout.seq_len), by_rule)
    assert module._rows_of(None, queries, 9) is None


def test_a_model_counts_its_calls_as_steps_and_is_left_as_it_was():
    model, call = tiny_flux(), flux_call(6, 5, 4)
    flexclear.transform(model, None, backend="sdpa")
    with torch.no_grad():
        before = model(**call).sample
        with observe(model, LAYERS[:1], steps=[1]) as found:
            watched = model(**call).sample
            model(**flux_call(4, 4, 4))
            model(**call)
        assert torch.equal(watched, before)
    assert [(one.step, one.grid) for one in found] == [(1, (4, 4))]
    assert "attend" not in vars(model.transformer_blocks[1].attn.processor)


def test_reference_pictures_are_no_part_of_the_curves():
    model, call = tiny_flux(), flux_call(6, 8, 4)
    flexclear.transform(model, None, backend="sdpa")
    reference = call["img_ids"][:24].clone()
    reference[:, 0] = 1
    call["img_ids"] = torch.cat([call["img_ids"], reference])
    call["hidden_states"] = torch.cat([call["hidden_states"], torch.randn(1, 24, 8)], dim=1)
    with torch.no_grad(), observe(model, LAYERS, queries=[(5, 7)]) as found:
        model(**call)
    for one in found:
        assert one.mass.sum(1).tolist() == pytest.approx([1, 1])
        assert (one.maps[5, 7].sum((1, 2)) < 0.95).all()


def test_pictures_have_a_column_per_head_and_one_for_their_mean():
    model = tiny_flux()
    flexclear.transform(model, None, backend="sdpa")
    with torch.no_grad(), observe(model, LAYERS[:1], queries=[(1, 2), (5, 4)]) as found:
        model(**flux_call(6, 5, 4))
    picture = Image.new("RGB", (50, 60), "white")
    sheet = attention_pictures(picture, found[0])
    one_head = attention_pictures(picture, found[0], [1])
    assert sheet.width - one_head.width == 224 + 12
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert (0, 255, 255) in colours, "the query is not marked"
    with pytest.raises(ValueError, match="has heads 0 to 1, got 2"):
        attention_pictures(picture, found[0], [2])


def test_what_cannot_be_observed_is_named():
    model = tiny_flux()
    with pytest.raises(ValueError, match="is not transformed"), observe(model):
        pass
    flexclear.transform(model, None, backend="sdpa")
    with pytest.raises(ValueError, match="no joint attention layer 'x'"), observe(model, ["x"]):
        pass
    with pytest.raises(ValueError, match="query 6 x 0 is outside of the 6 x 5"), observe(model, queries=[(6, 0)]):
        model(**flux_call(6, 5, 4))
    flexclear.transform(model, attention="linear", backend="sdpa")
    with pytest.raises(ValueError, match="no softmax weights"), observe(model):
        pass
    flexclear.transform(model, 3, down_factor=2, backend="sdpa")
    with pytest.raises(ValueError, match="has pooled keys"), observe(model):
        pass
    video = flexclear.transform(tiny_hunyuan_video(), 2, frame_radius=1)
    with pytest.raises(ValueError, match="HunyuanVideoTransformer3DModel makes videos"), observe(video):
        pass
