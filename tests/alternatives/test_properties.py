"""Locality, softmax, rank and token integrity are measured, and come out where theory tells what they must be."""

from __future__ import annotations

import math

import pytest
import torch

import flexclear
from flexclear.alternatives import (
    AgentAttention,
    NeighborhoodAttention,
    PixArtAttention,
    StridedAttention,
    SwinAttention,
)
from flexclear.alternatives.properties import attention_map, capture, compare, measure, table
from flexclear.masks import Disc, Layout, dense_mask

from helpers.models import flux_call, tiny_flux

LAYER = "single_transformer_blocks.0.attn"
GRID, TEXT = (6, 8), 5
IMAGE = GRID[0] * GRID[1]
HEAD_DIM = 16
ROWS = {
    "dense": {"r": None},
    "linear": {"attention": "linear"},
    "sigmoid": {"attention": "sigmoid"},
    "pixart": {"attention": PixArtAttention(2)},
    "agent": {"attention": AgentAttention(3)},
    "strided": {"attention": StridedAttention(2)},
    "swin": {"attention": SwinAttention(4)},
    "neighborhood": {"attention": NeighborhoodAttention(3)},
    "clear": {"r": 3},
    "down": {"r": 3, "down_factor": 2},
}


@pytest.fixture(scope="module")
def call():
    return flux_call(*GRID, TEXT)


@pytest.fixture(scope="module")
def found(call):
    return compare(tiny_flux(), call, LAYER, ROWS, tokens=4)


@pytest.mark.parametrize("order", ["tiled", "raster"])
def test_the_map_of_a_window_is_softmax_over_its_keys_in_raster_order(call, order):
    captured = capture(flexclear.transform(tiny_flux(), r=3, backend="sdpa", order=order), call, LAYER)
    plain = capture(flexclear.transform(tiny_flux(), r=3, backend="sdpa", order="raster"), call, LAYER)
    scores = plain.query[0] @ plain.key[0].transpose(1, 2) / math.sqrt(HEAD_DIM)
    mask = dense_mask(Layout(*GRID, TEXT, order="raster"), Disc(3))
    expected = scores.masked_fill(~mask, -math.inf).softmax(-1)
    assert (attention_map(captured) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("row", ["linear", "agent", "pixart", "swin", "down"])
def test_a_map_times_values_is_what_the_layer_puts_out(call, row):
    captured = capture(flexclear.transform(tiny_flux(), **ROWS[row], backend="sdpa", order="raster"), call, LAYER)
    value = torch.randn_like(captured.query)
    out = captured.plan.attend(captured.slot, captured.query, captured.key, value, captured.weight)
    assert (attention_map(captured) @ value[0] - out[0]).abs().max() <= 1e-10


def test_a_map_is_the_same_however_many_values_are_tried_at_a_time(call, monkeypatch):
    from flexclear.alternatives import properties

    captured = capture(flexclear.transform(tiny_flux(), attention="agent"), call, LAYER)
    whole = attention_map(captured)
    monkeypatch.setattr(properties, "MAX_NUMBERS", 1)
    assert torch.allclose(attention_map(captured), whole, atol=1e-12)


def test_softmax_over_original_keys_is_kept_by_windows_only(found):
    for row in ("dense", "strided", "swin", "neighborhood", "clear"):
        assert found[row].softmax_error <= 1e-9, row
    for row in ("linear", "sigmoid", "pixart", "agent", "down"):
        assert found[row].softmax_error > 0.01, row


def test_tokens_are_intact_where_none_is_pooled(found):
    for row in ("dense", "linear", "sigmoid", "strided", "swin", "neighborhood", "clear"):
        assert found[row].intact == 1, row
    for row in ("pixart", "agent", "down"):
        assert found[row].intact == 0, row


def test_ranks_are_bounded_by_heads_cells_and_agents(found):
    assert found["linear"].numerical_rank <= HEAD_DIM
    assert found["pixart"].numerical_rank <= 3 * 4
    assert found["agent"].numerical_rank <= 9
    for row in ("dense", "strided", "swin", "clear"):
        assert found[row].numerical_rank > 0.9 * IMAGE, row
    for properties in found.values():
        assert 1 <= properties.effective_rank <= properties.rank_limit == IMAGE
        assert properties.effective_rank <= properties.numerical_rank + 1e-6


def test_mass_lies_where_windows_let_it(found):
    for properties in found.values():
        assert sum(properties.mass_by_distance) == pytest.approx(1)
        assert sum(properties.uniform_by_distance) == pytest.approx(1)
        assert 0 < properties.text_share < 1
    assert found["clear"].within(3) == pytest.approx(1)
    assert found["dense"].within(3) < 0.9
    order = sorted(found, key=lambda row: found[row].relative_distance)
    assert set(order[:3]) == {"clear", "neighborhood", "swin"}
    assert found["strided"].relative_distance > 0.8


def test_equal_weights_are_as_far_as_uniform_ones_and_weigh_everything_alike(call):
    model = tiny_flux()
    with torch.no_grad():
        model.get_submodule(LAYER).norm_q.weight.zero_()
    uniform = compare(model, call, LAYER, {"dense": {"r": None}}, tokens=1)["dense"]
    assert uniform.relative_distance == pytest.approx(1)
    assert uniform.text_share == pytest.approx(TEXT / (TEXT + IMAGE))
    assert (uniform.numerical_rank, round(uniform.effective_rank, 3)) == (1, 1)
    assert uniform.mass_by_distance == pytest.approx(uniform.uniform_by_distance)


def test_comparing_leaves_the_model_as_it_was(call):
    model = tiny_flux()
    processors = model.attn_processors
    compare(model, call, LAYER, {"clear": {"r": 3}}, tokens=1)
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    flexclear.transform(model, r=3, backend="sdpa")
    capture(model, call, LAYER)
    assert "attend" not in vars(model.get_submodule(LAYER).processor)


def test_the_table_has_a_row_for_each_mechanism(found):
    lines = table(found, near=3).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert lines[2].startswith("| dense |")
    assert "| 0.000 |" in lines[2]
    assert lines[2].endswith("| 100% |")


@pytest.mark.parametrize(
    ("options", "changes", "layer", "message"),
    [
        ({"r": 3}, {}, "blocks.0", r"layer must be an attention layer of the model, from 'transformer_blocks.0.attn'"),
        (None, {}, LAYER, r"is not transformed; flexclear.transform\(model, None\) leaves it dense"),
        ({"r": 3}, {"batch": 2}, LAYER, "measured on one sample, but this call has 2"),
    ],
)
def test_what_cannot_be_measured_is_named(options, changes, layer, message):
    model = tiny_flux() if options is None else flexclear.transform(tiny_flux(), **options, backend="sdpa")
    with pytest.raises(ValueError, match=message):
        capture(model, flux_call(*GRID, TEXT, **changes), layer)


def test_no_token_to_try_is_an_error(call):
    captured = capture(flexclear.transform(tiny_flux(), r=3, backend="sdpa"), call, LAYER)
    with pytest.raises(ValueError, match="tokens must be an int >= 1 to try for integrity, got 0"):
        measure(captured, tokens=0)
