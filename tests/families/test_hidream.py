"""HiDream-I1: its pipeline end to end, dense and windowed; sizes that are filled up; its LoRA loader; what is refused."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import flexclear
from flexclear.compile import repeated_blocks

from contract.oracle import RADIUS, expected, far, run, same
from contract.pipelines import check_windowed
from contract.rows_latents import HIDREAM
from contract.shapes import Shape
from helpers.models_latents import hidream_call, hidream_text_len, tiny_hidream
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


LLAMA = 16
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


def text_lens(shape):
    """Texts of T5 and twice of Llama, and what fills up to 256 tokens."""
    return (shape.text_len + 2 * LLAMA + (0 if shape.height == shape.width else 256 - shape.height * shape.width),)


PIPELINE = dataclasses.replace(HIDREAM, text_lens=text_lens)


@pytest.mark.parametrize("size", [SIZE, (64, 64)])
def test_the_pipeline_is_windowed(pipe, size):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    options = {"height": size[0], "width": size[1], "guidance_scale": 3.5, **SHORT}
    check_windowed(pipe, PIPELINE, *([load, pipe.unload_lora_weights] if size == SIZE else []), **options)


def test_features_of_llama_s_layers_may_come_as_a_list():
    model, call = flexclear.transform(tiny_hidream(), r=RADIUS, backend="sdpa"), hidream_call(9, 13, 7)
    listed = list(call["encoder_hidden_states_llama3"])
    assert torch.equal(run(model, {**call, "encoder_hidden_states_llama3": listed}), run(model, call))
    with pytest.raises(ValueError, match=r"needs encoder_hidden_states_llama3 .* got \[\]"):
        run(model, {**call, "encoder_hidden_states_llama3": []})


@pytest.mark.parametrize("square", [False, True])
def test_a_large_image_must_be_square(square):
    """As in the plain model."""
    height, width = (17, 17) if square else (16, 17)
    model, call = tiny_hidream(), hidream_call(height, width, 7)
    if square:
        row = dataclasses.replace(HIDREAM, text_lens=lambda shape: (hidream_text_len(model, height, width, 7),))
        reference = expected(row, model, Shape(height, width, 7), call)
        far(run(model, call), reference, "the window")
        same(run(flexclear.transform(copy.deepcopy(model), r=RADIUS, backend="sdpa"), call), reference)
        return
    with pytest.raises(ValueError, match=r"16 x 17 = 272 tokens: .* not square of 256 tokens at most"):
        run(flexclear.transform(model, r=RADIUS, backend="sdpa"), call)


def test_the_blocks_that_compile_are_those_inside_the_model_s():
    model = tiny_hidream()
    assert repeated_blocks(model) == [each.block for each in (*model.double_stream_blocks, *model.single_stream_blocks)]


def test_packed_tokens_are_refused():
    model = flexclear.transform(tiny_hidream(), r=RADIUS)
    packed, masks = torch.zeros(1, 256, 16), torch.ones(1, 256)
    ids, sizes = torch.zeros(1, 256, 3), [(9, 13)]
    call = {**hidream_call(9, 13, 7), "hidden_states": packed}
    with pytest.raises(ValueError, match="takes no img_ids: tokens that are packed already"):
        run(model, {**call, "img_ids": ids, "img_sizes": sizes, "hidden_states_masks": masks})
    with pytest.raises(ValueError, match=r"takes latents of one image, .* got \[1, 256, 16\]"):
        run(model, call)


def test_a_block_inside_with_a_forward_of_its_own_is_refused():
    class Other(type(tiny_hidream().single_stream_blocks[0].block)):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    model = tiny_hidream()
    model.single_stream_blocks[1].block.__class__ = Other
    with pytest.raises(TypeError, match=r"single_stream_blocks\[1\] is a Other, which has a forward of its own"):
        flexclear.transform(model, r=RADIUS)


def test_a_lora_is_loaded(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_lora(pipe, load, pipe.unload_lora_weights, height=56, width=72, **SHORT)
