"""HunyuanImage 2.1: its pipeline and its refiner's end to end, prompts with and without quoted text, LoRAs."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from helpers.models_latents import tiny_hunyuan_image
from helpers.pipeline_parts import PROMPTS, byte_tokenizer, check_lora, check_pipeline, draw, lora, quiet, t5

SIZE = (48, 64)
"""A token is a latent and covers 4 x 4 pixels: 12 x 16 tokens."""
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


def test_the_distilled_pipeline_runs():
    pipe = pipeline(guided=False, guidance_embeds=True, use_meanflow=True)
    check_pipeline(pipe, SIZE, distilled_guidance_scale=3.25, guided={"distilled_guidance_scale": 7.0})


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


def test_a_lora_is_loaded_into_the_transformer(pipe):
    """The pipeline has no loader."""
    assert not hasattr(pipe, "load_lora_weights")

    def load():
        pipe.transformer.load_lora_adapter(lora(pipe.transformer, prefix=""), prefix=None)

    check_lora(pipe, load, pipe.transformer.unload_lora, height=48, width=64)
