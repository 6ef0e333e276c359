"""FLUX.1's pipelines beyond text to image: Fill, Control, Kontext, Redux, true CFG, distilled guidance, schnell."""

from __future__ import annotations

import warnings

import pytest
import torch
from PIL import Image

import flexclear
from flexclear.masks import Disc, Layout, dense_mask
from flexclear.runtime.plan import plans

R = 3
TEXT = 32
PROMPT = "a red apple on a blue background"


@pytest.fixture(scope="module")
def base():
    """The embedded pipeline; one token of it covers 8 x 8 pixels."""
    return flexclear.embedded.pipeline()


def pipeline(base, kind, transformer=None, **parts):
    """A pipeline class of diffusers with the embedded pipeline's parts."""
    import diffusers

    parts = {**base.components, "transformer": transformer or base.transformer, **parts}
    made = getattr(diffusers, kind)(**{name: part for name, part in parts.items() if part is not None})
    made.set_progress_bar_config(disable=True)
    return made


def transformer(in_channels=32, guidance_embeds=False):
    """A random transformer that fits the embedded pipeline's text encoders and VAE."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=32,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        pooled_projection_dim=96,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    ).eval()


def drawing(height, width, kind="L"):
    return getattr(Image, "radial_gradient" if kind == "L" else "linear_gradient")("L").resize((width, height))


def draw(pipe, height=96, width=128, *, embeds=None, mask=None, steps=2, **kwargs):
    """The latents that a pipeline ends with."""
    words = {"prompt": PROMPT} if embeds is None else embeds
    masked = {} if mask is None else {"joint_attention_kwargs": {"attention_mask": mask}}
    return pipe(
        **words,
        **masked,
        **kwargs,
        height=height,
        width=width,
        num_inference_steps=steps,
        max_sequence_length=TEXT,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images


def assert_equals_the_dense_mask(pipe, height=96, width=128, text_len=TEXT, references=(), **kwargs):
    """The transformed pipeline ends with the latents of the stock one under the dense mask, and not with its own."""
    layout = Layout(height // 8, width // 8, text_len, order="raster", references=references)
    mask = dense_mask(layout, Disc(R))
    expected = draw(pipe, height, width, mask=mask, **kwargs)
    dense = draw(pipe, height, width, **kwargs)
    flexclear.transform(pipe, r=R, backend="sdpa")
    try:
        ours = draw(pipe, height, width, **kwargs)
    finally:
        flexclear.restore(pipe)
    assert (ours - expected).abs().max() <= 1e-4
    assert (dense - expected).abs().max() > 1e-3, "the window makes no difference here"


@pytest.mark.parametrize(("height", "width"), [(96, 128), (136, 72)])
def test_fill_is_windowed(base, height, width):
    pipe = pipeline(base, "FluxFillPipeline", transformer(in_channels=32 + 32 + 64))
    extra = {"image": drawing(height, width).convert("RGB"), "mask_image": drawing(height, width, "mask")}
    assert_equals_the_dense_mask(pipe, height, width, **extra)


@pytest.mark.parametrize("kind", ["FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"])
def test_control_is_windowed(base, kind):
    pipe = pipeline(base, kind, transformer(in_channels=64))
    picture = drawing(96, 128).convert("RGB")
    extra = {"control_image": picture}
    if kind != "FluxControlPipeline":
        extra |= {"image": picture.rotate(90), "strength": 1.0}
    if kind == "FluxControlInpaintPipeline":
        extra["mask_image"] = drawing(96, 128, "mask")
    assert_equals_the_dense_mask(pipe, **extra)


@pytest.mark.parametrize("reference", [(96, 128), (120, 112)], ids=["of the same size", "of another size"])
@pytest.mark.parametrize("kind", ["FluxKontextPipeline", "FluxKontextInpaintPipeline"])
def test_kontext_s_reference_picture_is_a_second_grid(base, kind, reference):
    pipe = pipeline(base, kind)
    height, width = reference
    picture = drawing(height, width).convert("RGB")
    extra = {"image": picture, "max_area": 96 * 128, "_auto_resize": False}
    if kind == "FluxKontextInpaintPipeline":
        extra |= {"mask_image": drawing(height, width, "mask"), "strength": 1.0}
        extra |= {"image": drawing(96, 128).convert("RGB"), "image_reference": picture}
    assert_equals_the_dense_mask(pipe, references=((height // 8, width // 8),), **extra)


def test_kontext_without_a_reference_is_text_to_image(base):
    assert_equals_the_dense_mask(pipeline(base, "FluxKontextPipeline"), max_area=96 * 128)


def test_a_reference_that_the_window_hides_from_part_of_the_image_is_warned_of_once(base):
    pipe = pipeline(base, "FluxKontextPipeline")
    extra = {"image": drawing(64, 64).convert("RGB"), "max_area": 96 * 128, "_auto_resize": False}
    plans.clear()
    flexclear.transform(pipe, r=R, backend="sdpa")
    try:
        with pytest.warns(UserWarning, match="8 x 8 tokens ends so far before the image's 12 x 16.*disc_r3"):
            draw(pipe, **extra)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*reference image")
            draw(pipe, **extra)
    finally:
        flexclear.restore(pipe)


@pytest.mark.parametrize(
    ("r", "reference", "reaches"),
    [(5, (16, 16), True), (4, (16, 16), False), (5, (16, 12), True), (4, (16, 12), False), (1, (20, 12), False)],
)
def test_a_reference_reaches_the_whole_image_if_the_disc_around_its_far_corner_holds_the_image_s(r, reference, reaches):
    from flexclear.runtime.reach import warn_of_unreached

    layout = Layout(20, 16, 4, references=(reference,))
    mask = dense_mask(layout.with_order("raster"), Disc(r))
    image, others = mask[4 : 4 + 320], 4 + 320
    seen = image[:, others:].any(1).all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_unreached(layout, Disc(r))
    assert (not caught) == bool(seen)


def test_redux_makes_the_prompt_longer_by_its_picture_tokens(base):
    from diffusers import FluxPriorReduxPipeline
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    redux = FluxPriorReduxPipeline(
        image_encoder=SiglipVisionModel(config).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
        image_embedder=ReduxImageEncoder(redux_dim=16, txt_in_features=96).eval(),
        text_encoder=base.text_encoder,
        text_encoder_2=base.text_encoder_2,
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer_2,
    )
    with torch.no_grad():
        text, pooled, _ = base.encode_prompt(PROMPT, None, max_sequence_length=TEXT)
    prompt = dict(redux(drawing(96, 128).convert("RGB"), prompt_embeds=text, pooled_prompt_embeds=pooled))
    assert prompt["prompt_embeds"].shape[1] == TEXT + 16
    assert_equals_the_dense_mask(pipeline(base, "FluxPipeline"), text_len=TEXT + 16, embeds=prompt)


@pytest.mark.parametrize("kind", ["FluxPipeline", "FluxKontextPipeline"])
def test_true_guidance_windows_both_of_its_calls(base, kind):
    extra = {"true_cfg_scale": 3.0, "negative_prompt": "a sunflower"}
    if kind == "FluxKontextPipeline":
        extra |= {"image": drawing(96, 128).convert("RGB"), "max_area": 96 * 128, "_auto_resize": False}
        assert_equals_the_dense_mask(pipeline(base, kind), references=((12, 16),), **extra)
    else:
        assert_equals_the_dense_mask(pipeline(base, kind), **extra)


def test_distilled_guidance_is_an_argument_like_any_other(base):
    pipe = pipeline(base, "FluxPipeline", transformer(guidance_embeds=True))
    weak = draw(pipe, guidance_scale=1.0)
    assert (draw(pipe, guidance_scale=7.0) - weak).abs().max() > 1e-4
    assert_equals_the_dense_mask(pipe, guidance_scale=7.0)


@pytest.mark.parametrize("steps", [1, 4])
def test_schnell_s_few_steps_without_guidance(base, steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    pipe = pipeline(base, "FluxPipeline", scheduler=scheduler)
    assert not pipe.transformer.config.guidance_embeds
    assert_equals_the_dense_mask(pipe, steps=steps, guidance_scale=0.0)
