"""``explain(model)`` says what each layer will do."""

from __future__ import annotations

import re

import pytest
import torch

import flexclear
from flexclear.masks import Disc, Layout, cost
from flexclear.masks.blocks import default_block_size

from helpers.models import tiny_flux


def test_a_plain_model_is_dense_everywhere():
    told = flexclear.explain(tiny_flux())
    assert "not transformed" in str(told)
    assert [layer.window for layer in told.layers] == [None] * 4


def test_every_layer_shows_its_own_window_and_cost():
    model = flexclear.transform(tiny_flux(), r=[8, 8, None, 4], ntk_factor=10, proportional_attention=True)
    told = flexclear.explain(model, height=512, width=768, text_len=77)
    assert [layer.window for layer in told.layers] == [Disc(8), Disc(8), None, Disc(4)]
    layout = Layout(32, 48, 77)
    blocks = default_block_size(layout.seq_len, device="cpu", dtype=torch.float32)  # of windows that differ
    assert told.layers[0].cost == cost(layout, Disc(8), channels=32, block_size=blocks)
    assert told.layers[2].cost.pairs == layout.seq_len**2
    assert told.flops == sum(layer.cost.flops for layer in told.layers)
    text = str(told)
    assert re.search(r"^  transformer_blocks.0-1.attn +2 x disc_r8 ", text, re.M)
    for part in ("1 x dense", "1 x disc_r4", "rotary base times 10", "512 x 768 px: 32 x 48 image tokens, 77 of text"):
        assert part in text


def test_a_pipeline_is_explained_through_its_transformer():
    pipe = flexclear.transform(flexclear.embedded.pipeline(), r=4, dense_steps=(2, 1))
    assert "dense in the first 2 and the last 1 denoising steps" in str(flexclear.explain(pipe))


def test_a_pipelines_vae_says_how_many_pixels_make_a_token():
    pipe = flexclear.transform(flexclear.embedded.pipeline(), r=4)
    assert "at 256 x 128 px: 32 x 16 image tokens" in str(flexclear.explain(pipe, height=256, width=128))
    assert "at 256 x 128 px: 16 x 8 image tokens" in str(flexclear.explain(pipe.transformer, height=256, width=128))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"height": 512}, "pass height and width in pixels, or neither; got height=512 and width=None"),
        ({"height": 8, "width": 512}, "height must be an int >= 16 in pixels, got 8"),
        ({"height": 512, "width": 512, "text_len": -1}, "text_len must be an int >= 0 in tokens, got -1"),
    ],
)
def test_sizes_that_make_no_sense_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        flexclear.explain(tiny_flux(), **kwargs)


def test_a_model_that_is_not_supported_is_named():
    import torch

    with pytest.raises(TypeError, match="Linear is not a model that flexclear can transform"):
        flexclear.explain(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("args", "kwargs", "given"),
    [((), {"r": 2}, "r=2"), ((1024, 1024), {}, "1024, 1024"), ((1024,), {"r": 8}, "1024, r=8")],
    ids=["radius", "by place", "both"],
)
def test_what_describes_a_window_is_refused_beside_a_model(args, kwargs, given):
    with pytest.raises(TypeError, match=rf"takes height, width, num_frames, text_len by name, got {given}\."):
        flexclear.explain(tiny_flux(), *args, **kwargs)
