"""GLM-Image: its pipeline end to end, dense and windowed, whose prior tokens an autoregressive model makes; caches; LoRAs."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import flexclear

from contract.oracle import RADIUS, run
from contract.pipelines import check_windowed
from contract.rows_latents import GLM_IMAGE
from helpers.models_latents import glm_image_call, tiny_glm_image
from helpers.pipeline_parts import byte_tokenizer, check_lora, check_pipeline, draw, image_vae, lora, quiet, t5

SIZE = (96, 160)
"""A token covers 16 x 16 pixels, which the processor takes for granted, a prior token 32 x 32: 6 x 10 and 3 x 5."""
PROMPTS = ("a sign that says 'open' above a door", "the words 'red apple'")
"""What is quoted is all that the text encoder is given."""
WORDS = {"image_token": "<image>", "grid_bos_token": "<grid>", "grid_eos_token": "</grid>"}
CHAT = """{% for message in messages %}{% for part in message.content %}
{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"""


def autoregressive():
    """A processor, and the smallest model there is room for, which makes prior tokens of a codebook of 32."""
    from transformers import (
        GlmImageConfig,
        GlmImageForConditionalGeneration,
        GlmImageImageProcessorPil,
        GlmImageProcessor,
    )

    torch.manual_seed(3)
    tokenizer = byte_tokenizer(*WORDS.values(), padding_side="left", extra_special_tokens=WORDS)
    image, start, end = tokenizer.convert_tokens_to_ids(["<image>", "<start>", "<end>"])
    text = {
        "vocab_size": 288,
        "vision_vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 287,  # no prior token: as many are made as the image takes
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "intermediate_size": 16,
    }
    config = GlmImageConfig(
        text_config=text,
        vision_config=vision,
        vq_config={"embed_dim": 8, "num_embeddings": 32, "latent_channels": 16},
        image_token_id=image,
        image_start_token_id=start,
        image_end_token_id=end,
    )
    processor = GlmImageProcessor(GlmImageImageProcessorPil(), tokenizer, chat_template=CHAT)
    return processor, GlmImageForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def pipe():
    from diffusers import FlowMatchEulerDiscreteScheduler, GlmImagePipeline
    from transformers import ByT5Tokenizer

    processor, model = autoregressive()
    return quiet(
        GlmImagePipeline(
            tokenizer=ByT5Tokenizer(),
            processor=processor,
            text_encoder=t5(),
            vision_language_encoder=model,
            vae=image_vae(4, latents_mean=[0.1] * 4, latents_std=[1.5] * 4),
            transformer=tiny_glm_image(text_embed_dim=16),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
        )
    )


def prior(height=6, width=10, batch=2, seed=0):
    return torch.randint(0, 32, (batch, height * width), generator=torch.Generator().manual_seed(seed))


def test_the_pipeline_runs(pipe):
    check_pipeline(pipe, SIZE, prompts=PROMPTS, guidance_scale=1.0, guided={"guidance_scale": 3.5})


def test_text_and_prior_tokens_count_each(pipe):
    options = {"height": 96, "width": 160, "prompt": PROMPTS, "prior_token_ids": prior()}
    images = draw(pipe, **options)
    for change in ({"prompt": PROMPTS[::-1]}, {"prior_token_ids": prior(seed=1)}):
        other = draw(pipe, **{**options, **change})
        assert (images - other).flatten(1).abs().amax(1).min() > 1e-4, change


def test_condition_images_are_keys_in_front_of_the_text(pipe):
    """Their prior tokens are given: diffusers 0.42.1 does not read them from what transformers 5.23 gives."""
    pictures = [[Image.radial_gradient("L").convert("RGB").resize((64, 96))], [Image.new("RGB", (64, 96), "red")]]
    given = {
        "image": pictures,
        "prior_token_ids": prior(),
        "prior_token_image_ids": [prior(6, 4, 1)[0], prior(6, 4, 1, 1)[0]],
        "source_image_grid_thw": [torch.tensor([[1, 6, 4]])] * 2,
    }
    modes = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: modes.append((kwargs["kv_caches"][0].mode, kwargs["encoder_hidden_states"].shape[1])),
        with_kwargs=True,
    )
    options = {"height": 96, "width": 160, "prompt": PROMPTS, "guidance_scale": 2.0}
    images = draw(pipe, **options, **given)
    handle.remove()
    assert modes[:2] == [("write", 0)] * 2
    assert [mode for mode, _ in modes[2:]] == ["read", "skip"] * 2
    plain = draw(pipe, **options, prior_token_ids=prior())
    assert (images - plain).flatten(1).abs().amax(1).min() > 1e-4, "a condition image makes no difference"
    flexclear.transform(pipe, r=RADIUS, backend="sdpa")
    with pytest.raises(ValueError, match=r"kv_caches .* in mode 'write': .*flexclear\.restore"):
        draw(pipe, **options, **given)
    flexclear.restore(pipe)
    assert torch.equal(draw(pipe, **options, **given), images)


def test_the_pipeline_is_windowed(pipe):
    def load():
        pipe.transformer.load_lora_adapter(lora(pipe.transformer, prefix=""), prefix=None)

    options = {"height": 96, "width": 160, "prompt": PROMPTS, "prior_token_ids": prior(), "guidance_scale": 2.0}
    check_windowed(pipe, GLM_IMAGE, load, pipe.transformer.unload_lora, **options)


@pytest.mark.parametrize("mode", ["write", "read"])
def test_caches_that_are_written_or_read_are_refused_and_others_change_nothing(mode):
    model, call = flexclear.transform(tiny_glm_image(), r=RADIUS, backend="sdpa"), glm_image_call(6, 8, 5)
    caches = call["kv_caches"]
    expected = run(model, {**call, "kv_caches": None})
    for harmless in (None, "skip"):
        caches.set_mode(harmless)
        assert torch.equal(run(model, call), expected)
    caches[1].mode = mode
    with pytest.raises(ValueError, match=f"in mode '{mode}'"):
        run(model, call)
    assert all(not cache.k_caches for cache in caches.caches)


def test_a_lora_is_loaded_into_the_transformer(pipe):
    """The pipeline has no loader."""
    assert not hasattr(pipe, "load_lora_weights")

    def load():
        pipe.transformer.load_lora_adapter(lora(pipe.transformer, prefix=""), prefix=None)

    options = {"height": 96, "width": 160, "prompt": PROMPTS, "prior_token_ids": prior()}
    check_lora(pipe, load, pipe.transformer.unload_lora, **options)
