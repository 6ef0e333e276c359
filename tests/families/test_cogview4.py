"""CogView4: its pipelines end to end, dense and windowed, its LoRA loader, and what is refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from PIL import Image

import flexclear

from contract.oracle import RADIUS, expected, run, same
from contract.pipelines import check_windowed
from contract.rows_latents import COGVIEW4
from contract.shapes import Shape
from helpers.models_latents import cogview4_call, tiny_cogview4
from helpers.pipeline_parts import LANGUAGE, PROMPTS, byte_tokenizer, check_lora, check_pipeline, image_vae, lora, quiet

SIZE = (48, 64)
"""A token covers 4 x 4 pixels: 12 x 16 tokens. The pipeline takes multiples of 16 pixels."""
GUIDED = {"guidance_scale": 3.5, "negative_prompt": ["green", "grey fields"]}


def parts(**config):
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
    check_windowed(pipe, COGVIEW4, height=48, width=64, control_image=picture, **GUIDED)


def test_the_pipeline_is_windowed(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_windowed(pipe, COGVIEW4, load, pipe.unload_lora_weights, height=48, width=64, **GUIDED)


def test_a_lora_is_loaded(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_lora(pipe, load, pipe.unload_lora_weights, height=48, width=64, prompt=PROMPTS)


def test_a_whole_model_compiles_with_another_base_of_its_frequencies():
    model, call, shape = tiny_cogview4(num_layers=1), cogview4_call(8, 12, 9, 2), Shape(8, 12, 9, 2)
    plain = copy.deepcopy(model)
    COGVIEW4.stretch(plain, 10.0)
    flexclear.transform(model, r=RADIUS, backend="sdpa", ntk_factor=10.0)
    model.compile(backend="eager")
    same(run(model, call), expected(COGVIEW4, plain, shape, call))
    with flexclear.override(ntk_factor=1.0):
        same(run(model, call), expected(COGVIEW4, tiny_cogview4(num_layers=1), shape, call))
    torch.compiler.reset()


def test_another_base_holds_where_a_hook_has_put_a_forward_on_the_module():
    """As those of accelerate and of diffusers do."""
    model, call = tiny_cogview4(), cogview4_call(8, 12, 9)
    flexclear.transform(model, r=RADIUS, backend="sdpa", ntk_factor=10.0)
    stretched = run(model, call)
    model.rope.forward = functools.partial(type(model.rope).forward, model.rope)
    assert torch.equal(run(model, call), stretched)


def test_a_rotary_embedding_of_the_caller_s_is_refused():
    model, call = flexclear.transform(tiny_cogview4(), r=3), cogview4_call(6, 8, 5)
    rotary = model.rope(call["hidden_states"])
    with pytest.raises(ValueError, match="takes no image_rotary_emb: the window travels with"):
        run(model, {**call, "image_rotary_emb": rotary})


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 4, 9, 8), "latents of 9 x 8 do not divide into the patches of 2 x 2"),
        ((1, 4, 1, 8, 8), r"takes latents of one image, \[batch, channels, height, width\], got \[1, 4, 1, 8, 8\]"),
    ],
)
def test_latents_that_are_no_image_are_refused(shape, says):
    model = flexclear.transform(tiny_cogview4(), r=3)
    with pytest.raises(ValueError, match=says):
        run(model, {**cogview4_call(4, 4, 5), "hidden_states": torch.zeros(shape)})


def test_processors_of_packed_training_are_refused():
    from diffusers.models.transformers.transformer_cogview4 import CogView4TrainingAttnProcessor

    model = tiny_cogview4()
    model.transformer_blocks[1].attn1.set_processor(CogView4TrainingAttnProcessor())
    with pytest.raises(TypeError, match=r"transformer_blocks\[1\].attn1 has a CogView4TrainingAttnProcessor"):
        flexclear.transform(model, r=3)
