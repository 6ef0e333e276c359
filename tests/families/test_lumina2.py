"""Lumina 2: its pipeline end to end, dense and windowed, its LoRA loader, positions and masks that are refused."""

from __future__ import annotations

import pytest
import torch

import flexclear
from flexclear.testing import check_family

from contract.oracle import RADIUS, run, same
from contract.pipelines import check_windowed
from contract.rows_latents import LUMINA2
from helpers.models_latents import lumina2_call, tiny_lumina2
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


def test_the_pipeline_is_windowed(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_windowed(pipe, LUMINA2, load, pipe.unload_lora_weights, height=144, width=208, guidance_scale=4.0, **SHORT)


@pytest.mark.parametrize(
    "r", [RADIUS, None, {"noise_refiner": None, "default": RADIUS}, {"layers": None, "default": RADIUS}]
)
def test_a_batch_of_captions_gives_what_each_gives_alone(r):
    """Windowed or dense."""
    model, call = flexclear.transform(tiny_lumina2(), r=r, backend="sdpa"), lumina2_call(9, 13, 20, 3, padded=True)
    together = run(model, call)
    for sample in range(3):
        same(
            together[sample : sample + 1],
            run(model, {name: value[sample : sample + 1] for name, value in call.items()}),
        )


def test_check_family_knows_captions_of_different_lengths():
    call = lumina2_call(8, 9, 12, 2, padded=True)
    assert len(check_family(tiny_lumina2(num_layers=1), call, grid=(8, 9)).errors) == 5


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((65, 4, 5), r"65 x 4 tokens behind a caption of 5 .* end at 64 x 64 tokens and a caption of 199"),
        ((4, 65, 5), r"4 x 65 tokens behind a caption of 5"),
        ((4, 4, 200), r"4 x 4 tokens behind a caption of 200"),
    ],
)
def test_images_and_captions_beyond_the_positions_are_refused(sizes, says):
    model = flexclear.transform(tiny_lumina2(), r=RADIUS, backend="sdpa")
    with pytest.raises(ValueError, match=says):
        run(model, lumina2_call(*sizes))
    run(model, lumina2_call(4, 4, 199))


def test_masks_that_the_model_would_read_wrongly_are_refused():
    model, call = flexclear.transform(tiny_lumina2(), r=RADIUS, backend="sdpa"), lumina2_call(6, 7, 9, 2, padded=True)
    mask = call["encoder_attention_mask"]
    with pytest.raises(ValueError, match=r"has padding before text or within it.*padding_side='right'"):
        run(model, {**call, "encoder_attention_mask": mask.flip(1)})
    with pytest.raises(ValueError, match=r"must be of shape \(2, 9\) .* got \(2, 8\)"):
        run(model, {**call, "encoder_attention_mask": mask[:, :8]})
    run(model, call)


def test_a_lora_is_loaded(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_lora(pipe, load, pipe.unload_lora_weights, height=96, width=128, **SHORT)
