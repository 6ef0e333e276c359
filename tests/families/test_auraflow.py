"""AuraFlow: its pipeline end to end, and its LoRA loader."""

from __future__ import annotations

import pytest

import flexclear

from helpers.models_latents import tiny_auraflow
from helpers.pipeline_parts import check_lora, check_pipeline, image_vae, lora, quiet, t5

SIZE = (48, 64)
"""A token covers 4 x 4 pixels: 12 x 16 tokens."""


@pytest.fixture(scope="module")
def pipe():
    from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler

    tokenizer = flexclear.embedded.pipeline().tokenizer_2
    return quiet(
        AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=t5("UMT5EncoderModel", words=len(tokenizer)),
            vae=image_vae(),
            transformer=tiny_auraflow(joint_attention_dim=16),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    )


def test_the_pipeline_runs(pipe):
    guided = {"guidance_scale": 3.5, "negative_prompt": ["green", "grey fields"]}
    check_pipeline(pipe, SIZE, max_sequence_length=16, guided=guided)


def test_a_lora_is_loaded(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    options = {"height": 48, "width": 64, "max_sequence_length": 16}
    check_lora(pipe, load, pipe.unload_lora_weights, **options)
