"""HiDream-I1: its pipeline end to end, which fills sizes up that are not square, and its LoRA loader."""

from __future__ import annotations

import pytest
import torch

import flexclear

from helpers.models_latents import tiny_hidream
from helpers.pipeline_parts import (
    KL,
    LANGUAGE,
    PROMPTS,
    byte_tokenizer,
    check_lora,
    check_pipeline,
    draw,
    image_vae,
    lora,
    quiet,
    t5,
)

SIZE = (56, 72)
"""A token covers 4 x 4 pixels: 14 x 18 tokens."""


def clip(tokenizer, width):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 32, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(**sizes, **ids, num_hidden_layers=1, num_attention_heads=2)
    return CLIPTextModelWithProjection(config).eval()


@pytest.fixture(scope="module")
def pipe():
    from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline
    from transformers import LlamaConfig, LlamaForCausalLM

    embedded = flexclear.embedded.pipeline()
    torch.manual_seed(3)
    pipe = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae(**KL),
        text_encoder=clip(embedded.tokenizer, 4),
        tokenizer=embedded.tokenizer,
        text_encoder_2=clip(embedded.tokenizer, 6),
        tokenizer_2=embedded.tokenizer,
        text_encoder_3=t5(words=len(embedded.tokenizer_2)),
        tokenizer_3=embedded.tokenizer_2,
        text_encoder_4=LlamaForCausalLM(LlamaConfig(**LANGUAGE, attn_implementation="eager")).eval(),
        tokenizer_4=byte_tokenizer(model_max_length=64),
        transformer=tiny_hidream(caption_channels=[16, 16]),
    )
    pipe.default_sample_size = 32  # every size is scaled to 64 x 64 pixels, of 128 x 128 latents
    return quiet(pipe)


SHORT = {"max_sequence_length": 16}
GUIDED = {"guidance_scale": 3.5, "negative_prompt": ["green", "grey fields"]}


def test_the_pipeline_runs(pipe):
    check_pipeline(pipe, SIZE, guidance_scale=1.0, guided=GUIDED, **SHORT)


def test_sizes_are_scaled_to_one_area_and_filled_up_unless_square(pipe):
    seen = []
    handle = pipe.transformer.x_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    images = draw(pipe, prompt=PROMPTS[0], height=20, width=30, guidance_scale=1.0, **SHORT)
    assert images.shape == (1, 3, 52, 76)  # 13 x 19 tokens
    assert draw(pipe, prompt=PROMPTS[0], height=32, width=32, guidance_scale=1.0, **SHORT).shape == (1, 3, 64, 64)
    handle.remove()
    assert seen == [256] * 4
    assert pipe.transformer.max_seq == 256


def test_a_lora_is_loaded(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_lora(pipe, load, pipe.unload_lora_weights, height=56, width=72, **SHORT)
