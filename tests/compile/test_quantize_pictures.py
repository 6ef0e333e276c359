"""Images of the embedded pipeline with eight-bit weights against those in bfloat16, window and seeds the same.

The window has the weights that were distilled for it: undistilled ones leave it undecided what to draw, and one image in some
thirty then falls to the other side of a decision when weights are rounded.
"""

from __future__ import annotations

import copy

import pytest
import torch

import flexclear
from flexclear import embedded
from flexclear.compile import quantize
from flexclear.embedded.evaluation import generate, picture_psnr, trained_requests
from flexclear.embedded.vocabulary import read_vocabulary

MIN_FEATURES = 128
"""The embedded model's linears are small."""

FLOOR = {"weight_only": 22.0, "int8": 30.0}
"""dB of the worst image. Measured: see bench/results/quantize.md; well below, so that weights may be trained anew."""


@pytest.fixture(scope="module")
def pipe():
    loaded = embedded.pipeline(torch_dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    flexclear.transform(loaded, r=4, backend="sdpa")
    flexclear.load_weights(loaded, "embedded", filename="clear_local_4.safetensors")
    return loaded


@pytest.fixture(scope="module")
def draw():
    vocabulary = read_vocabulary(embedded.model_directory())
    requests = trained_requests(vocabulary, 8, seed=1)
    return lambda pipe: generate(pipe, vocabulary, requests, steps=8)


@pytest.fixture(scope="module")
def expected(pipe, draw):
    return draw(pipe)


@pytest.mark.parametrize("recipe", FLOOR)
def test_eight_bit_weights_draw_the_same_pictures(pipe, draw, expected, recipe):
    plain = pipe.transformer
    pipe.transformer = copy.deepcopy(plain)
    try:
        report = quantize(pipe.transformer, recipe, min_features=MIN_FEATURES)
        assert report.bytes_after < 0.7 * report.bytes_before
        levels = picture_psnr(draw(pipe), expected)
    finally:
        pipe.transformer = plain
    assert levels.min() >= FLOOR[recipe], levels
    assert levels.max() < 70, "nothing was quantized"
    strangers = picture_psnr(expected[:-1], expected[1:])
    assert strangers.max() < FLOOR[recipe], "the floor would let another image pass"
