"""The nodes on ComfyUI's own engine: equal to dense attention under the window's mask, refused where they would not be."""

from __future__ import annotations

import re

import pytest

from helpers import comfyui_cases as cases
from helpers.comfyui_engine import MATTERS, TOLERANCE

FLEX, SDPA = "flex", "sdpa"

DENSE = {
    "flux": ("flux", (32, 32), FLEX),
    "flux-wide": ("flux", (18, 46), FLEX),
    "flux-odd": ("flux", (33, 41), FLEX),
    "flux-sdpa": ("flux", (21, 32), SDPA),
    "qwen": ("qwen", (32, 32), SDPA),
    "qwen-wide": ("qwen", (14, 50), SDPA),
    "qwen-odd": ("qwen", (33, 21), SDPA),
    "wan": ("wan", (5, 16, 16), SDPA),
    "wan-wide": ("wan", (3, 12, 28), SDPA),
    "wan-odd": ("wan", (7, 13, 19), SDPA),
    "wan-image": ("wan", (1, 22, 18), SDPA),
    "vace": ("vace", (4, 16, 12), SDPA),
    "qwen-flex": ("qwen", (33, 21), FLEX),
    "wan-flex": ("wan", (7, 13, 19), FLEX),
    "vace-flex": ("vace", (4, 16, 12), FLEX),
}


@pytest.mark.kept("flux*", "qwen", "qwen-wide", "qwen-odd", "wan", "wan-wide", "wan-odd", "wan-image", "vace")
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_a_window_equals_dense_attention_under_its_mask(comfyui, case):
    found = comfyui(cases.against_dense, *case)
    assert found["far"] < TOLERANCE
    assert found["matters"] > MATTERS
    # Both halves of guidance in one call: two layers and two more, of VACE one more.
    assert found["calls"] == {"flux": 4, "vace": 3}.get(case[0], 2)


CALLS = {
    "flux-batch": ("flux", (16, 20), {"batch": 3}),
    "flux-texts": ("flux", (16, 20), {"texts": (20, 7)}),
    "flux-reference": ("flux", (20, 16), {"references": ((24, 17), (12, 12))}),
    "flux-reference-offset": ("flux", (20, 16), {"references": ((20, 16),), "method": "offset"}),
    "qwen-padded": ("qwen", (20, 16), {"hidden": (6, 3)}),
    "qwen-padded-batch": ("qwen", (20, 16), {"hidden": (6, 3), "batch": 2}),
    "qwen-reference": ("qwen", (20, 16), {"references": ((24, 17),), "hidden": (6, 3)}),
    "qwen-reference-time-zero": ("qwen", (20, 16), {"references": ((24, 17),), "method": "index_timestep_zero"}),
    "qwen-layers": ("qwen", (3, 16, 20), {}),
    "wan-batch": ("wan", (3, 16, 20), {"batch": 2, "texts": (20, 7)}),
}


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_calls_of_every_kind_equal_dense_attention_under_the_mask(comfyui, case):
    kind, sides, others = case
    found = comfyui(cases.against_dense, kind, sides, SDPA, **others)
    assert found["far"] < TOLERANCE
    assert found["matters"] > MATTERS


@pytest.mark.kept
@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_calls_of_every_kind_equal_it_compiled(comfyui, case):
    kind, sides, others = case
    found = comfyui(cases.against_dense, kind, sides, FLEX, **others)
    assert found["far"] < TOLERANCE
    assert found["matters"] > MATTERS


@pytest.mark.parametrize("what", [cases.residuals, cases.gradients], ids=lambda case: case.__name__)
def test_residuals_and_gradients_are_those_of_dense_attention_under_the_mask(comfyui, what):
    found = comfyui(what)
    assert found["far"] < TOLERANCE
    assert found["matters"] > MATTERS


def test_a_window_leaves_no_trace_on_the_model_that_it_was_made_of(comfyui):
    found = comfyui(cases.off_again)
    assert found["same"]
    assert found["state"]
    assert found["matters"] > MATTERS


def test_a_second_window_replaces_the_first(comfyui):
    found = comfyui(cases.replaced)
    assert found["same"]
    assert found["matters"] > MATTERS
    assert found["wrappers"] == {"apply_model": 1, "diffusion_model": 1}


def test_a_lora_before_or_behind_the_window_is_the_same(comfyui):
    found = comfyui(cases.lora)
    assert found["same"]
    assert found["far"] < TOLERANCE
    assert found["matters"] > MATTERS
    assert found["patches"]


def test_dense_steps_are_the_first_and_the_last_of_the_sampler(comfyui):
    found = comfyui(cases.dense_steps)
    assert found["far"] < 4 * TOLERANCE  # four steps
    assert found["matters"] > MATTERS
    assert found["calls"] == 2 * 4


REFUSED = {
    "a subclass": "TypeError: windows are not known for .*Subclass. They are for Flux, QwenImageTransformer2DModel, WanModel",
    "another class": "TypeError: windows are not known for comfy.ldm.wan.model.CameraWanModel",
    "an image window on a video": r"TypeError: WanModel makes videos: use Window Attention \(video\), not .*\(image\)",
    "a video window on an image": r"TypeError: Flux makes images: use Window Attention \(image\), not .*\(video\)",
    "another override before": "ValueError: another node has given this model its own attention .*refused.<locals>.someone",
    "another override behind": "ValueError: a node behind the window has given .* attention .*refused.<locals>.someone",
    "compiled before": "ValueError: TorchCompileModel does not go with windows",
    "compiled behind": "ValueError: TorchCompileModel does not go with windows",
    "more tokens": r"ValueError: attention from 108 to 108 tokens, .* 8 x 10 image tokens and 20 of text, 100 in all",
    "a mask": "ValueError: another node has added the mask of attention",
    "no attention": "RuntimeError: Flux has attended without asking",
    "a mask over the image": "ValueError: this call of Flux has an attention_mask over text and image",
    "weighed text": "ValueError: attention_mask weights text tokens",
    "a latent without frames": r"ValueError: a latent of Qwen-Image of shape \(1, 16, 16, 20\) is no latent",
    "as many tokens as text": "ValueError: this video has 1 x 4 x 5 = 20 tokens, as many as the text",
    "reference videos": "ValueError: context_latents puts reference videos behind it",
    "steps that nobody counts": "ValueError: dense_first=1 and dense_last=0 need a sampler",
}


@pytest.fixture(scope="module")
def errors(comfyui):
    return comfyui(cases.refused)


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_window_cannot_keep_exactly_is_refused_by_name(errors, what):
    assert re.match(REFUSED[what], errors[what]), errors[what]


def test_masks_shapes_and_options_of_single_calls_are_heeded(comfyui):
    found = comfyui(cases.asked_directly)
    assert found["mask"], "cross-attention keeps its mask"
    assert found["apart"] == (1, 2, 30, 16)
    assert found["same"]
    assert "attention under a window has no scale" in found["said"]


def test_a_call_leaves_nothing_in_the_options_and_knows_the_keys_of_an_image(comfyui):
    found = comfyui(cases.told_by_a_call)
    assert found["inside"] == [True]
    assert not found["left"], "what runs after the transformer would find its call"
    assert found["keys"] == [cases.TEXT, 257]
