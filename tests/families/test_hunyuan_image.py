"""HunyuanImage 2.1: its pipeline and its refiner's end to end, dense and windowed; quoted text, LoRAs, what is refused."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from PIL import Image

import flexclear
from flexclear.families.target import px_per_token

from contract.oracle import RADIUS, expected, far, run, same
from contract.pipelines import check_windowed
from contract.rows_latents import HUNYUAN_IMAGE
from contract.shapes import Shape
from helpers.models_latents import hunyuan_image_call, tiny_hunyuan_image
from helpers.pipeline_parts import PROMPTS, byte_tokenizer, check_lora, check_pipeline, draw, lora, quiet, t5

SIZE = (48, 64)
"""A token is a latent and covers 4 x 4 pixels: 12 x 16 tokens."""
GLYPHS = dataclasses.replace(
    HUNYUAN_IMAGE, text_lens=lambda shape: (shape.text_len + 24,), other_lens=lambda shape: (shape.text_len,)
)
"""With a second text of 24 tokens."""
QUOTED = ('a sign that says "open"', PROMPTS[0])


def text_encoder():
    """The smallest Qwen2.5-VL there is room for."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(3)
    text = {
        "vocab_size": 288,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def vae(kind="AutoencoderKLHunyuanImage", **config):
    import diffusers

    torch.manual_seed(4)
    sizes = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 32, 32),
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "scaling_factor": 0.75,
    }
    return getattr(diffusers, kind)(**{**sizes, **config}).eval()


def shorten(pipe):
    """Templates of a few bytes and short texts in place of a thousand tokens."""
    pipe.prompt_template_encode = "<user>{}"
    pipe.prompt_template_encode_start_idx = 3
    pipe.tokenizer_max_length = 40
    pipe.tokenizer_2_max_length = 24
    return quiet(pipe)


def pipeline(guided=True, **config):
    from diffusers import AdaptiveProjectedMixGuidance, FlowMatchEulerDiscreteScheduler, HunyuanImagePipeline
    from transformers import ByT5Tokenizer

    guiders = {"guider": AdaptiveProjectedMixGuidance(), "ocr_guider": AdaptiveProjectedMixGuidance(guidance_scale=2.0)}
    return shorten(
        HunyuanImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            vae=vae(sample_size=64),
            text_encoder=text_encoder(),
            tokenizer=byte_tokenizer(),
            text_encoder_2=t5(),
            tokenizer_2=ByT5Tokenizer(),
            transformer=tiny_hunyuan_image(text_embed_dim=16, text_embed_2_dim=16, **config),
            **guiders if guided else {},
        )
    )


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def test_the_pipeline_runs_with_guidance(pipe):
    negative = check_pipeline(pipe, SIZE, negative_prompt=["green", "grey fields"])
    assert (check_pipeline(pipe, SIZE) - negative).abs().max() > 1e-4, "the negative prompt makes no difference"


def test_quoted_text_is_a_second_text(pipe):
    quoted, plain = draw(pipe, prompt=QUOTED, height=48, width=64), draw(pipe, height=48, width=64)
    assert quoted.shape == plain.shape == (2, 3, *SIZE)


def test_the_pipeline_is_windowed(pipe):
    def load():
        pipe.transformer.load_lora_adapter(lora(pipe.transformer, prefix=""), prefix=None)

    options = {"prompt": QUOTED, "height": 48, "width": 64}
    check_windowed(pipe, GLYPHS, load, pipe.transformer.unload_lora, **options)
    assert px_per_token(pipe) == 4


def test_the_distilled_pipeline_runs():
    pipe = pipeline(guided=False, guidance_embeds=True, use_meanflow=True)
    check_pipeline(pipe, SIZE, distilled_guidance_scale=3.25, guided={"distilled_guidance_scale": 7.0})
    check_windowed(pipe, GLYPHS, prompt=QUOTED, height=48, width=64, distilled_guidance_scale=3.25)


def test_the_refiner_takes_latents_of_one_frame():
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanImageRefinerPipeline

    pipe = shorten(
        HunyuanImageRefinerPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
            vae=vae("AutoencoderKLHunyuanImageRefiner", temporal_compression_ratio=2),
            text_encoder=text_encoder(),
            tokenizer=byte_tokenizer(),
            transformer=tiny_hunyuan_image(
                text_embed_dim=16,
                in_channels=16,
                out_channels=8,
                patch_size=(1, 1, 1),
                rope_axes_dim=(4, 6, 6),
                guidance_embeds=True,
            ),
        )
    )
    picture = Image.radial_gradient("L").convert("RGB").resize((64, 48))
    shapes = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["hidden_states"].shape)), with_kwargs=True
    )
    check_pipeline(pipe, SIZE, image=picture)
    handle.remove()
    assert set(shapes) == {(2, 16, 1, 12, 16)}
    check_windowed(pipe, HUNYUAN_IMAGE, height=48, width=64, image=picture)
    flexclear.transform(pipe, r=RADIUS)
    call = {**hunyuan_image_call(4, 4, 5), "hidden_states": torch.zeros(1, 16, 2, 4, 4)}
    with pytest.raises(
        ValueError, match=r"one image, \[batch, channels, 1 frame, height, width\], got \[1, 16, 2, 4, 4\]"
    ):
        pipe.transformer(**call)


def test_a_lora_is_loaded_into_the_transformer(pipe):
    """The pipeline has no loader."""
    assert not hasattr(pipe, "load_lora_weights")

    def load():
        pipe.transformer.load_lora_adapter(lora(pipe.transformer, prefix=""), prefix=None)

    check_lora(pipe, load, pipe.transformer.unload_lora, height=48, width=64)


@pytest.mark.parametrize("padded", [False, True])
def test_two_texts_are_joined_before_what_pads_them(padded):
    """Each sample keeps another number of tokens, and the last one has no quoted words."""
    model = tiny_hunyuan_image(text_embed_2_dim=12)
    call, shape = hunyuan_image_call(9, 7, 20, 3, glyphs=24, padded=padded), Shape(9, 7, 20, 3)
    reference = expected(GLYPHS, model, shape, call)
    far(expected(GLYPHS, model, shape, call, padding=False), reference, "the padding")
    far(run(model, call), reference, "the window")
    windowed = flexclear.transform(copy.deepcopy(model), r=RADIUS, backend="sdpa")
    same(run(windowed, call), reference)
    changed = call["encoder_hidden_states_2"] + 5.0 * (1 - call["encoder_attention_mask_2"])[..., None]
    assert torch.equal(run(windowed, {**call, "encoder_hidden_states_2": changed}), run(windowed, call))
    whole = {**call, "encoder_attention_mask_2": torch.ones(3, 24, dtype=torch.int64)}
    same(run(windowed, whole), expected(GLYPHS, model, shape, whole))


def test_a_second_text_that_the_model_does_not_read_changes_nothing():
    model = tiny_hunyuan_image()
    call, both = (hunyuan_image_call(6, 7, 9, 2, glyphs=glyphs) for glyphs in (None, 24))
    flexclear.transform(model, r=RADIUS, backend="sdpa")
    assert torch.equal(run(model, both), run(model, call))


def test_masks_that_are_missing_or_do_not_fit_are_refused():
    model = flexclear.transform(tiny_hunyuan_image(text_embed_2_dim=12), r=RADIUS)
    call = hunyuan_image_call(6, 7, 9, 2, glyphs=24)
    for number in ("", "_2"):
        name = f"encoder_attention_mask{number}"
        with pytest.raises(ValueError, match=f"needs {name} as a tensor"):
            run(model, {**call, name: None})
        with pytest.raises(ValueError, match=rf"{name} must be of shape \(2, \d+\) .* got \(2, 3\)"):
            run(model, {**call, name: torch.ones(2, 3)})
