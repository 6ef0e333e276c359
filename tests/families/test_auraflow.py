"""AuraFlow: its pipeline end to end, dense and windowed, its LoRA loader, its learned positions."""

from __future__ import annotations

import pytest
import torch

import flexclear
from flexclear.alternatives.properties import attention_map, capture
from flexclear.analysis.attention import observe

from contract.oracle import run
from contract.pipelines import check_windowed
from contract.rows_latents import AURAFLOW
from helpers.models_latents import auraflow_call, tiny_auraflow
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


def test_the_pipeline_is_windowed(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    options = {"height": 48, "width": 64, "max_sequence_length": 16, "guidance_scale": 3.5}
    check_windowed(pipe, AURAFLOW, load, pipe.unload_lora_weights, **options)


def test_a_lora_is_loaded(pipe):
    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    options = {"height": 48, "width": 64, "max_sequence_length": 16}
    check_lora(pipe, load, pipe.unload_lora_weights, **options)


def test_a_model_left_dense_keeps_raster_order_and_every_bit():
    model, call = tiny_auraflow(), auraflow_call(9, 13, 5, 2)
    dense = run(model, call)
    assert torch.equal(run(flexclear.transform(model, r=None, backend="sdpa"), call), dense)


@pytest.mark.parametrize("r", [3, None, {"joint_transformer_blocks": None, "default": 3}])
def test_attention_that_is_looked_at_is_that_of_the_tokens_at_their_places(r):
    model, call, found, maps = tiny_auraflow(), auraflow_call(9, 13, 5), {}, {}
    for order in ("tiled", "raster"):
        flexclear.transform(model, r=r, backend="sdpa", order=order)
        with observe(model, queries=[(2, 11)]) as found[order]:
            run(model, call)
        maps[order] = attention_map(capture(model, call, "single_transformer_blocks.1.attn"))
    assert (maps["tiled"] - maps["raster"]).abs().max() < 1e-5
    for one, other in zip(*found.values(), strict=True):
        assert (one.mass - other.mass).abs().max() < 1e-5
        assert (one.maps[2, 11] - other.maps[2, 11]).abs().max() < 1e-5
    assert len(one.maps) == 1
    assert all(each.mass[:, 3:].sum() == 0 for each in found["tiled"]) == (r == 3)


@pytest.mark.parametrize(
    ("height", "width"), [(25, 8), (6, 30)]
)  # the second is another row's positions in the plain model
def test_sizes_beyond_the_learned_positions_are_refused(height, width):
    model = flexclear.transform(tiny_auraflow(), r=3, backend="sdpa")
    with pytest.raises(
        ValueError, match=rf"{height} x {width} tokens .* end at 24 x 24 tokens .*pos_embed_max_size=576"
    ):
        run(model, auraflow_call(height, width, 5))
    run(model, auraflow_call(24, 24, 5))
