"""transform inside real Flux pipelines, on the embedded model: text to image, image to image, inpainting, ControlNet."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import flexclear
from flexclear.masks import Disc, Layout, dense_mask
from flexclear.runtime.plan import plans

from helpers.models import tiny_flux

STEPS = 2


@pytest.fixture(scope="module")
def base():
    pipe = flexclear.embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(base):
    yield base
    flexclear.restore(base)


def picture(pipe, height=128, width=128, text_len=32, **kwargs):
    return pipe(
        "a red apple on a blue background",
        height=height,
        width=width,
        num_inference_steps=STEPS,
        max_sequence_length=text_len,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **kwargs,
    ).images


def under_the_dense_mask(pipe, height=128, width=128, text_len=32, **kwargs):
    layout = Layout(height // 8, width // 8, text_len, order="raster")
    return picture(
        pipe, height, width, text_len, joint_attention_kwargs={"attention_mask": dense_mask(layout, Disc(3))}, **kwargs
    )


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 168)])
def test_a_transformed_pipeline_draws_what_the_original_draws_under_the_dense_mask(pipe, height, width):
    expected = under_the_dense_mask(pipe, height, width)
    assert flexclear.transform(pipe, r=3) is pipe
    assert (picture(pipe, height, width) - expected).abs().max() <= 1e-3


def test_all_steps_and_prompts_of_a_resolution_share_one_plan(pipe):
    flexclear.transform(pipe, r=3)
    plans.clear()
    picture(pipe)
    pipe("a sunflower", num_inference_steps=STEPS, max_sequence_length=32)
    assert (plans.stats().misses, plans.stats().hits) == (1, 2 * STEPS - 1)


def test_a_restored_pipeline_draws_bit_for_bit_what_it_drew_before(pipe):
    before = picture(pipe)
    picture(flexclear.transform(pipe, r=3))
    assert torch.equal(picture(flexclear.restore(pipe)), before)


def test_the_pipeline_s_own_batching_is_windowed(pipe):
    flexclear.transform(pipe, r=3, backend="sdpa")
    prompts = ["a red apple on a blue background", "a sunflower on a white background"]

    def draw(prompts, seeds):
        return pipe(
            prompts,
            num_inference_steps=STEPS,
            max_sequence_length=32,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            output_type="pt",
        ).images

    together = draw(prompts, [1, 2])
    apart = torch.cat([draw(prompts[:1], [1]), draw(prompts[1:], [2])])
    assert (together - apart).abs().max() <= 1e-3


@pytest.mark.parametrize("kind", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_image_guided_pipelines_share_the_windowed_transformer(pipe, kind):
    import diffusers

    guided = getattr(diffusers, kind).from_pipe(pipe)
    guided.set_progress_bar_config(disable=True)
    start = Image.radial_gradient("L").resize((128, 96)).convert("RGB")
    extra = {"image": start, "strength": 0.9}
    if kind == "FluxInpaintPipeline":
        extra["mask_image"] = Image.linear_gradient("L").resize((128, 96))
    expected = under_the_dense_mask(guided, 96, 128, **extra)
    dense = picture(guided, 96, 128, **extra)
    flexclear.transform(guided, r=3)
    ours = picture(guided, 96, 128, **extra)
    assert (ours - expected).abs().max() <= 1e-3
    assert (ours - dense).abs().max() > 1e-2


def test_a_controlnet_s_residuals_follow_the_token_order(pipe):
    from diffusers import FluxControlNetModel, FluxControlNetPipeline

    config = {key: value for key, value in pipe.transformer.config.items() if key != "pos_embed_max_size"}
    torch.manual_seed(0)
    control = FluxControlNetModel.from_config({**config, "num_layers": 1, "num_single_layers": 1}).eval()
    for parameter in [*control.controlnet_blocks.parameters(), *control.controlnet_single_blocks.parameters()]:
        torch.nn.init.normal_(parameter, std=0.05)
    guided = FluxControlNetPipeline(**pipe.components, controlnet=control)
    guided.set_progress_bar_config(disable=True)
    extra = {"control_image": Image.radial_gradient("L").resize((128, 96)).convert("RGB")}
    expected = under_the_dense_mask(guided, 96, 128, **extra)
    flexclear.transform(guided, r=3, backend="sdpa")
    assert (picture(guided, 96, 128, **extra) - expected).abs().max() <= 1e-3


def test_bfloat16_pictures_differ_by_rounding_only(pipe):
    half = copy.deepcopy(pipe.transformer).to(torch.bfloat16)
    original = pipe.transformer
    pipe.transformer = half
    try:
        expected = under_the_dense_mask(pipe.to(torch.bfloat16)).float()
        ours = picture(flexclear.transform(pipe, r=3)).float()
    finally:
        pipe.transformer = original
        pipe.to(torch.float32)
    assert (ours - expected).norm() / expected.norm() <= 2e-2


def test_a_pipeline_without_a_transformer_is_refused():
    with pytest.raises(
        TypeError, match="expected a diffusers model or a pipeline with a transformer, got SimpleNamespace"
    ):
        flexclear.transform(SimpleNamespace(unet=tiny_flux()))
