"""CogView4: its pipelines end to end, and its LoRA loader."""

from __future__ import annotations

import pytest
from PIL import Image

from helpers.models_latents import tiny_cogview4
from helpers.pipeline_parts import LANGUAGE, PROMPTS, byte_tokenizer, check_lora, check_pipeline, image_vae, lora, quiet

SIZE = (48, 64)
"""A token covers 4 x 4 pixels: 12 x 16 tokens. The pipeline takes multiples of 16 pixels."""
GUIDED = {"guidance_scale": 3.5, "negative_prompt": ["green", "grey fields"]}


def parts(**config):
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import GlmConfig, GlmModel

    torch.manual_seed(3)
    return {
        "tokenizer": byte_tokenizer(padding_side="left"),
        "text_encoder": GlmModel(GlmConfig(**LANGUAGE)).eval(),
        "vae": image_vae(),
        "transformer": tiny_cogview4(text_embed_dim=16, **config),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    }


@pytest.fixture(scope="module")
def pipe():
    from diffusers import CogView4Pipeline

    return quiet(CogView4Pipeline(**parts()))


def test_the_pipeline_runs(pipe):
    check_pipeline(pipe, SIZE, guidance_scale=1.0)
    check_pipeline(pipe, SIZE, **GUIDED)


def test_the_control_pipeline_runs():
    from diffusers import CogView4ControlPipeline

    pipe = quiet(CogView4ControlPipeline(**parts(in_channels=8)))
    picture = Image.radial_gradient("L").convert("RGB").resize((64, 48))
    images = check_pipeline(pipe, SIZE, control_image=picture, **GUIDED)
    other = check_pipeline(pipe, SIZE, control_image=picture.rotate(90), **GUIDED)
    assert (images - other).abs().max() > 1e-4, "the control image makes no difference"


def test_a_lora_is_loaded(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_lora(pipe, load, pipe.unload_lora_weights, height=48, width=64, prompt=PROMPTS)
