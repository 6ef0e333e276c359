"""ERNIE-Image: its pipeline end to end, dense and windowed, its LoRA loader, lengths of texts."""

from __future__ import annotations

import pytest
import torch

import flexclear
from flexclear.families.target import px_per_token

from contract.oracle import RADIUS, run
from contract.pipelines import check_windowed
from contract.rows_latents import ERNIE_IMAGE
from helpers.models_latents import ernie_image_call, tiny_ernie_image
from helpers.pipeline_parts import LANGUAGE, byte_tokenizer, check_lora, check_pipeline, image_vae, lora, quiet

SIZE = (48, 64)
"""A token covers 4 x 4 pixels: 12 x 16 tokens."""


@pytest.fixture(scope="module")
def pipe():
    from diffusers import ErnieImagePipeline, FlowMatchEulerDiscreteScheduler
    from transformers import Mistral3Config, Mistral3Model

    torch.manual_seed(3)
    vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "head_dim": 8, "image_size": 28, "patch_size": 14}
    config = Mistral3Config(text_config={"model_type": "mistral", **LANGUAGE}, vision_config=vision)
    vae = image_vae(kind="AutoencoderKLFlux2")
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return quiet(
        ErnieImagePipeline(
            transformer=tiny_ernie_image(text_in_dim=16),
            vae=vae,
            text_encoder=Mistral3Model(config).eval(),
            tokenizer=byte_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )


def test_the_pipeline_runs(pipe):
    guided = {"guidance_scale": 4.0, "negative_prompt": ["green", "grey fields"]}
    check_pipeline(pipe, SIZE, guidance_scale=1.0, guided=guided)


def test_the_pipeline_is_windowed(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_windowed(pipe, ERNIE_IMAGE, load, pipe.unload_lora_weights, height=48, width=64, guidance_scale=4.0)
    assert px_per_token(pipe) == 4


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ([9, 10], r"text_lens from 9 to 10 do not fit text_bth, which has 9 tokens"),
        ([-1, 9], r"text_lens from -1 to 9 do not fit"),
        ([9], r"one length for each of the 2 samples, got \(1,\)"),
    ],
)
def test_lengths_that_do_not_fit_the_text_are_refused(lengths, says):
    model = flexclear.transform(tiny_ernie_image(), r=RADIUS)
    with pytest.raises(ValueError, match=says):
        run(model, {**ernie_image_call(6, 7, 9, 2), "text_lens": torch.tensor(lengths)})


def test_a_lora_is_loaded(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_lora(pipe, load, pipe.unload_lora_weights, height=48, width=64)
