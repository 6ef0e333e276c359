"""GLM-Image: its pipeline end to end, whose prior tokens an autoregressive model makes, and LoRAs."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from helpers.models_latents import tiny_glm_image
from helpers.pipeline_parts import check_lora, check_pipeline, draw, image_vae, lora, quiet, t5

SIZE = (48, 64)
"""A token covers 4 x 4 pixels, and a prior token 2 x 2 of them: 12 x 16 tokens."""
TOKENS = 12 * 16
PROMPTS = ("a sign that says 'open' above a door", "the words 'red apple'")
"""What is quoted is all that the text encoder is given."""


@pytest.fixture(scope="module")
def pipe():
    from diffusers import FlowMatchEulerDiscreteScheduler, GlmImagePipeline
    from transformers import ByT5Tokenizer

    return quiet(
        GlmImagePipeline(
            tokenizer=ByT5Tokenizer(),
            processor=None,
            text_encoder=t5(),
            vision_language_encoder=None,  # prior tokens come with the calls
            vae=image_vae(latents_mean=[0.1] * 4, latents_std=[1.5] * 4),
            transformer=tiny_glm_image(text_embed_dim=16),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
        )
    )


def prior(count=TOKENS, batch=2, seed=0):
    return torch.randint(0, 32, (batch, count), generator=torch.Generator().manual_seed(seed))


def test_the_pipeline_runs(pipe):
    guided = {"guidance_scale": 3.5}
    options = {"prior_token_ids": prior(), "prompt": PROMPTS}
    images = draw(pipe, height=48, width=64, guidance_scale=1.0, **options)
    assert images.shape == (2, 3, *SIZE)
    for change in ({"prompt": PROMPTS[::-1]}, guided, {"prior_token_ids": prior(seed=1)}):
        other = draw(pipe, **{"height": 48, "width": 64, "guidance_scale": 1.0, **options, **change})
        assert (images - other).flatten(1).abs().amax(1).min() > 1e-4, change


def test_condition_images_are_keys_in_front_of_the_text(pipe):
    pictures = [[Image.radial_gradient("L").convert("RGB").resize((32, 48))], [Image.new("RGB", (32, 48), "red")]]
    given = {
        "image": pictures,
        "prior_token_ids": prior(),
        "prior_token_image_ids": [prior(12 * 8, 1)[0], prior(12 * 8, 1, 1)[0]],
        "source_image_grid_thw": [torch.tensor([[1, 12, 8]])] * 2,
    }
    modes = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: modes.append((kwargs["kv_caches"][0].mode, kwargs["encoder_hidden_states"].shape[1])),
        with_kwargs=True,
    )
    images = draw(pipe, prompt=PROMPTS, height=48, width=64, guidance_scale=2.0, **given)
    handle.remove()
    written, others = modes[:2], modes[2:]
    assert written == [("write", 0)] * 2
    assert [mode for mode, _ in others] == ["read", "skip"] * 2
    plain = draw(pipe, prompt=PROMPTS, height=48, width=64, guidance_scale=2.0, prior_token_ids=prior())
    assert (images - plain).flatten(1).abs().amax(1).min() > 1e-4, "a condition image makes no difference"


def test_a_lora_is_loaded_into_the_transformer(pipe):
    """The pipeline has no loader."""
    assert not hasattr(pipe, "load_lora_weights")

    def load():
        pipe.transformer.load_lora_adapter(lora(pipe.transformer, prefix=""), prefix=None)

    options = {"height": 48, "width": 64, "prompt": PROMPTS, "prior_token_ids": prior()}
    check_lora(pipe, load, pipe.transformer.unload_lora, **options)
