"""Clipped relative distances: every pair rotated by its own clipped offset, in float64, one pair at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import flexclear
from flexclear.analysis import Clip, clipped_attention, clipped_distances
from flexclear.masks import Layout

from helpers.models import flux_call, tiny_flux

AXES, THETA = (4, 6, 6), 10000.0


def rotated(vector, position):
    """A head's vector rotated to a position on three axes, channel pair by channel pair."""
    out, at = vector.clone(), 0
    for channels, place in zip(AXES, position, strict=True):
        for pair in range(channels // 2):
            angle = place * THETA ** (-2 * pair / channels)
            first, second = vector[at + 2 * pair], vector[at + 2 * pair + 1]
            out[at + 2 * pair] = first * math.cos(angle) - second * math.sin(angle)
            out[at + 2 * pair + 1] = first * math.sin(angle) + second * math.cos(angle)
        at += channels
    return out


def clipped(difference, kind, distance):
    if kind == "remote":
        return max(-distance, min(distance, difference))
    return -max(distance, -difference) if difference < 0 else max(distance, difference)


def positions(layout):
    image = [(0, y, x) for y in range(layout.height) for x in range(layout.width)]
    text = [(0, 0, 0)] * layout.text_len
    return text + image if layout.text_first else image + text


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(("kind", "distance"), [("remote", 1), ("remote", 0), ("local", 2), ("local", 9)])
def test_every_pair_has_its_own_clipped_offset(kind, distance, text_first):
    layout = Layout(4, 5, 3, text_first=text_first, order="raster")
    generator = torch.Generator().manual_seed(0)
    n, d = layout.seq_len, sum(AXES)
    bare_q, bare_k, value = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(3))
    places = positions(layout)
    is_image = [layout.image_start <= i < layout.image_start + layout.image_len for i in range(n)]
    scores = torch.empty(n, n, dtype=torch.float64)
    for i, j in itertools.product(range(n), range(n)):
        offset = [a - b for a, b in zip(places[i], places[j], strict=True)]
        if is_image[i] and is_image[j]:
            offset = [offset[0], clipped(offset[1], kind, distance), clipped(offset[2], kind, distance)]
        scores[i, j] = rotated(bare_q[i], offset) @ bare_k[j] / math.sqrt(d)
    expected = scores.softmax(-1) @ value
    query, key = (
        torch.stack([rotated(vector, place) for vector, place in zip(bare, places, strict=True)])
        for bare in (bare_q, bare_k)
    )
    given = [tokens[None, None] for tokens in (query, key, value)]
    found = clipped_attention(*given, layout, AXES, THETA, Clip(kind, distance))[0, 0]
    assert (found - expected).abs().max() <= 1e-10
    plain = torch.nn.functional.scaled_dot_product_attention(*given)[0, 0]
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("clip", [Clip("remote", 8), Clip("local", 0)])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_clip_that_nothing_meets_changes_nothing(clip, batch):
    model, call = tiny_flux(), flux_call(9, 7, 6, batch)
    flexclear.transform(model, None, backend="sdpa", order="raster")
    with torch.no_grad():
        before = model(**call).sample
        with clipped_distances(model, clip):
            assert (model(**call).sample - before).abs().max() <= 1e-5
        for other in (Clip("remote", 2), Clip("local", 3)):
            with clipped_distances(model, other):
                assert (model(**call).sample - before).abs().max() > 1e-3
        assert torch.equal(model(**call).sample, before)


def test_proportional_attention_is_kept():
    model, call = tiny_flux(), flux_call(6, 7, 6)
    flexclear.transform(model, None, backend="sdpa", order="raster", proportional_attention=True)
    with torch.no_grad():
        before = model(**call).sample
        with clipped_distances(model, Clip("remote", 9)):
            assert (model(**call).sample - before).abs().max() <= 1e-5


@pytest.mark.parametrize("options", [{"r": 3}, {"r": None, "order": "tiled"}, {"attention": "linear"}])
def test_only_the_dense_model_in_raster_order_is_clipped(options):
    model = tiny_flux()
    with (
        pytest.raises(ValueError, match="need the dense model in raster order"),
        clipped_distances(model, Clip("local", 1)),
    ):
        pass
    flexclear.transform(model, **{"backend": "sdpa", "order": "raster", **options})
    with (
        pytest.raises(ValueError, match="need the dense model in raster order"),
        clipped_distances(model, Clip("local", 1)),
    ):
        pass


def test_other_frequencies_and_reference_pictures_are_refused():
    model, call = tiny_flux(), flux_call(6, 5, 4)
    flexclear.transform(model, None, backend="sdpa", order="raster", ntk_factor=2.0)
    with (
        torch.no_grad(),
        clipped_distances(model, Clip("local", 1)),
        pytest.raises(ValueError, match="leave ntk_factor"),
    ):
        model(**call)
    assert "attend" not in vars(model.transformer_blocks[0].attn.processor)
    tokens = torch.zeros(1, 1, 4 + 9, 16)
    with pytest.raises(ValueError, match="one grid in raster order"):
        clipped_attention(tokens, tokens, tokens, Layout(3, 3, 4), AXES, THETA, Clip("local", 1))


def test_a_mask_over_text_is_refused_unless_it_hides_nothing():
    model, call = flexclear.transform(tiny_flux(), None, backend="sdpa", order="raster"), flux_call(6, 5, 4)
    keep = torch.ones(1, 1, 1, 34, dtype=torch.bool)
    with torch.no_grad(), clipped_distances(model, Clip("remote", 2)):
        expected = model(**call).sample
        ours = model(**call, joint_attention_kwargs={"attention_mask": keep}).sample
        assert torch.equal(ours, expected)
        keep[..., 2:4] = False
        with pytest.raises(ValueError, match="attention_mask of this call hides some of the text"):
            model(**call, joint_attention_kwargs={"attention_mask": keep})


@pytest.mark.parametrize(
    ("kind", "distance", "error", "message"),
    [
        ("far", 1, ValueError, "clip must be one of"),
        ("local", -1, ValueError, "clip distance must be an int >= 0"),
        ("remote", 1.5, TypeError, "clip distance must be an int"),
    ],
)
def test_a_clip_that_makes_no_sense_is_an_error(kind, distance, error, message):
    with pytest.raises(error, match=message):
        Clip(kind, distance)
