"""Qwen-Image 2.1: its pipeline end to end, dense and windowed, with and without its cache, with condition images; LoRA."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLProcessor

import flexclear
from flexclear.families.target import px_per_token
from flexclear.testing import check_family

from contract.oracle import RADIUS, expected, far, run, same
from contract.pipelines import check_windowed
from contract.rows_latents import QWEN_IMAGE21
from contract.shapes import Shape
from helpers.models_latents import qwen21_call, tiny_qwen21
from helpers.pipeline_parts import PROMPTS, byte_tokenizer, check_lora, check_pipeline, draw, lora, quiet

SIZE = (96, 160)
"""A token covers 16 x 16 pixels, which the pipeline takes for granted, and sides are of even numbers: 6 x 10 tokens."""
VISION = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>
{% endfor %}"""


class Processor(Qwen3VLProcessor):
    """Without videos, whose processor asks for torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def text_encoder(tokenizer):
    """The smallest Qwen3-VL there is room for."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(3)
    text = {
        "vocab_size": 288,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(VISION)), strict=True))
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids)).eval()


@pytest.fixture(scope="module")
def pipe():
    from diffusers import AutoencoderKLQwenImage21, FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline
    from transformers import Qwen2VLImageProcessorPil

    tokenizer = byte_tokenizer(*VISION, "<|im_start|>", "<|im_end|>", starts=False)
    images = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=1024, max_pixels=1 << 20)
    encoder = text_encoder(tokenizer)
    torch.manual_seed(4)
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    return quiet(
        QwenImage21Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=encoder,
            processor=Processor(images, tokenizer, chat_template=CHAT),
            transformer=tiny_qwen21(context_in_dim=16),
        )
    )


def test_the_pipeline_runs(pipe):
    guided = {"true_cfg_scale": 4.0, "negative_prompt": ["green", "grey fields"]}
    cached = check_pipeline(pipe, SIZE, guided=guided)
    assert (cached - check_pipeline(pipe, SIZE, guided=guided, use_kv_cache=False)).abs().max() < 1e-5


def test_condition_images_lie_within_the_text(pipe):
    picture = Image.radial_gradient("L").convert("RGBA").resize((64, 96))
    options = {"image": [picture, picture.rotate(90)], "output_resolution": 64, "height": 96, "width": 160}
    images = draw(pipe, prompt=PROMPTS[0], **options)
    assert images.shape == (1, 4, *SIZE)
    options["image"] = options["image"][::-1]
    assert (images - draw(pipe, prompt=PROMPTS[0], **options)).abs().max() > 1e-4


@pytest.mark.parametrize("cached", [True, False])
def test_the_pipeline_is_windowed(pipe, cached):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    options = {"height": 96, "width": 160, "true_cfg_scale": 4.0, "negative_prompt": ["green", "grey fields"]}
    options |= {"use_kv_cache": cached, "num_inference_steps": 3}
    check_windowed(pipe, QWEN_IMAGE21, *([load, pipe.unload_lora_weights] if cached else []), **options)
    assert px_per_token(pipe) == 16


@pytest.mark.parametrize("cached", [True, False])
def test_the_pipeline_is_windowed_with_condition_images(pipe, cached):
    picture = Image.radial_gradient("L").convert("RGBA").resize((64, 96))
    options = {"image": [picture, picture.rotate(90)], "output_resolution": 64, "height": 96, "width": 160}
    check_windowed(pipe, QWEN_IMAGE21, prompt=PROMPTS[0], use_kv_cache=cached, **options)


@pytest.mark.parametrize("padded", [False, True])
def test_condition_images_are_text_and_see_what_they_saw(padded):
    model, references = tiny_qwen21(), ((6, 4), (2, 8))
    call = qwen21_call(8, 10, 20, 2, padded=padded, references=references)
    shape = Shape(8, 10, 20 + 24 + 16, 2)
    reference, dense = expected(QWEN_IMAGE21, model, shape, call), run(model, call)
    far(QWEN_IMAGE21.image(dense, shape), QWEN_IMAGE21.image(reference, shape), "the window")
    flexclear.transform(model, r=RADIUS, backend="sdpa")
    same(run(model, call), reference)
    assert torch.equal(run(model, call)[:, :-80], dense[:, :-80])


def test_check_family_knows_rows_that_come_last():
    call = qwen21_call(8, 10, 12, 2, padded=True)
    assert len(check_family(tiny_qwen21(num_layers=1), call, grid=(8, 10)).errors) == 5


def test_calls_that_do_not_fit_are_refused():
    model, call = flexclear.transform(tiny_qwen21(), r=RADIUS, backend="sdpa"), qwen21_call(6, 8, 9, 2, padded=True)
    mask, places = call["encoder_hidden_states_mask"], call["img_mask"]
    other = places.clone()
    other[1, 2] = True
    for changed, says in (
        ({"hidden_states": call["hidden_states"][:, :-1]}, r"do not hold the 0 \+ 48 tokens"),
        ({"encoder_hidden_states_mask": mask[:, :-1]}, r"must be a tensor of shape \(2, 9\) .* got \(2, 8\)"),
        ({"img_mask": places[:, 1:]}, r"img_mask of shape \(2, 20\) does not hold the 9 places"),
        ({"img_mask": other}, "img_mask must be the same for the whole batch"),
        ({"img_mask": places.flip(1)}, "and end with the places of the image"),
        ({"img_shapes": [[(2, 6, 4)]] * 2}, "has several frames"),
        ({"attention_kwargs": {"attention_mask": mask}}, "holds an attention_mask"),
    ):
        with pytest.raises(ValueError, match=says):
            run(model, {**call, **changed})
    run(model, call)


def test_the_processor_that_compiles_its_own_mask_is_refused():
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor

    model = tiny_qwen21()
    model.set_attn_processor(QwenImage21FlexAttnProcessor())
    with pytest.raises(
        TypeError, match="has a QwenImage21FlexAttnProcessor; flexclear replaces QwenImage21AttnProcessor"
    ):
        flexclear.transform(model, r=RADIUS)


def test_a_lora_is_loaded(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_lora(pipe, load, pipe.unload_lora_weights, height=96, width=160)
