"""Lumina 2: its pipeline end to end, and its LoRA loader."""

from __future__ import annotations

import pytest
import torch

from helpers.models_latents import tiny_lumina2
from helpers.pipeline_parts import KL, LANGUAGE, byte_tokenizer, check_lora, check_pipeline, image_vae, lora, quiet

SIZE = (144, 208)
"""A token covers 16 x 16 pixels, which the pipeline takes for granted: 9 x 13 tokens."""
SHORT = {"max_sequence_length": 48, "system_prompt": "Draw."}


@pytest.fixture(scope="module")
def pipe():
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(3)
    return quiet(
        Lumina2Pipeline(
            transformer=tiny_lumina2(cap_feat_dim=16),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=image_vae(4, **KL),
            text_encoder=Gemma2Model(Gemma2Config(**LANGUAGE)).eval(),
            tokenizer=byte_tokenizer(),
        )
    )


def test_the_pipeline_runs(pipe):
    guided = {"guidance_scale": 4.0, "negative_prompt": ["green", "grey fields"]}
    images = check_pipeline(pipe, SIZE, guidance_scale=1.0, guided=guided, **SHORT)
    truncated = check_pipeline(pipe, SIZE, cfg_trunc_ratio=0.5, **guided, **SHORT)
    assert (images - truncated).abs().max() > 1e-4


def test_a_lora_is_loaded(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_lora(pipe, load, pipe.unload_lora_weights, height=96, width=128, **SHORT)
