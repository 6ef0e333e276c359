"""LTX-2: its pipelines end to end, dense and windowed, with sound; what is refused."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import flexclear

from contract.oracle import RADIUS, TOLERANCE, differ, expected, far, run, same, under
from contract.pipelines import STEPS, check_windowed
from contract.rows_video import LTX2
from contract.shapes import Shape
from helpers.models_latents import settle
from helpers.models_video import ltx2_call, tiny_ltx2
from helpers.pipeline_parts import LANGUAGE, PROMPTS, byte_tokenizer, draw, lora, quiet
from helpers.pipelines_video import picture, saved

SIZE = {"height": 32, "width": 64, "num_frames": 5}
"""Of a video whose latents are 3 x 16 x 32: its VAE makes 2 pixels and 2 frames one, but the first frame."""
TOKENS = Shape(16, 32, 16, 2, frames=3)
GUIDED = {
    "guidance_scale": 3.0,
    "negative_prompt": ["green", "grey fields"],
    "max_sequence_length": 16,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "spatio_temporal_guidance_blocks": None,
}
ONE = {**GUIDED, "prompt": PROMPTS[0], "negative_prompt": "green"}
WINDOWED = functools.partial(flexclear.transform, r=RADIUS, frame_radius=1, backend="sdpa")


def parts(**config):
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    from transformers import GlmConfig, GlmModel

    torch.manual_seed(3)
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    sound = AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=16,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return {
        "tokenizer": byte_tokenizer(padding_side="left"),
        "text_encoder": GlmModel(GlmConfig(**LANGUAGE)).eval(),
        "connectors": settle(connectors, 3),
        "vae": settle(vae, 3),
        "audio_vae": settle(sound, 3),
        "vocoder": settle(vocoder, 3),
        "transformer": tiny_ltx2(caption_channels=16, **config),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def test_text_to_video_is_windowed_and_saved_and_has_sound(tmp_path):
    from diffusers import LTX2Pipeline

    pipe = quiet(LTX2Pipeline(**parts()))

    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_windowed(pipe, LTX2, load, pipe.unload_lora_weights, **SIZE, **GUIDED)
    output = WINDOWED(pipe)(
        **SIZE, **ONE, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(2)
    )
    assert output.audio.isfinite().all()
    assert output.audio.std() > 0
    found = saved(output.frames[0], tmp_path / "video.gif")
    assert [each.size for each in found] == [(64, 32)] * 5


def test_guidance_by_values_in_place_of_attention_is_windowed_elsewhere():
    from diffusers import LTX2Pipeline

    pipe = quiet(LTX2Pipeline(**parts(perturbed_attn=True)))
    guided = {"stg_scale": 1.0, "audio_stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1], "modality_scale": 2.0}
    check_windowed(pipe, LTX2, **SIZE, **{**GUIDED, **guided})


def test_image_to_video_is_windowed_with_its_first_frame_at_time_0():
    from diffusers import LTX2ImageToVideoPipeline

    pipe = quiet(LTX2ImageToVideoPipeline(**parts()))
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["timestep"]), with_kwargs=True
    )
    check_windowed(pipe, LTX2, **SIZE, **ONE, image=picture(0, 32, 64), image_crf=0)
    assert all(not times[:, :512].any() and times[:, 512:].all() for times in seen)


@pytest.mark.parametrize(("indices", "beside"), [((0,), 0), ((0, 1), 512)])
def test_a_pipeline_of_conditions_is_windowed_and_keyframes_are_seen_by_all(indices, beside):
    from diffusers import LTX2ConditionPipeline
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    pipe = quiet(LTX2ConditionPipeline(**parts()))
    conditions = [
        LTX2VideoCondition(picture(number, 32, 64), index=index, strength=0.9, crf=0)
        for number, index in enumerate(indices)
    ]
    options = {**SIZE, **ONE, "conditions": conditions}
    dense = draw(pipe, **options)
    row = dataclasses.replace(LTX2, text_lens=lambda shape: (beside,), other_lens=lambda shape: ())
    plain = pipe.transformer.forward

    def forward(*args, **call):
        assert call["hidden_states"].shape[1] == 3 * 16 * 32 + beside
        with under(row, TOKENS):
            return plain(*args, **call)

    pipe.transformer.forward = forward
    reference = draw(pipe, **options)
    del pipe.transformer.forward
    far(dense, reference, "the window")
    assert differ(draw(WINDOWED(pipe), **options), reference) <= STEPS * TOLERANCE
    assert torch.equal(draw(flexclear.restore(pipe), **options), dense)


def test_sound_is_what_it_is_beside_a_windowed_video():
    """As the plain model's whose video attention has the dense mask, and nothing of it else."""
    shape = Shape(7, 9, 5, 2, frames=3)
    model, plain = (tiny_ltx2(attention_head_dim=64, cross_attention_dim=128) for _ in range(2))
    call = ltx2_call(3, 7, 9, 5, 2)
    with torch.no_grad(), under(LTX2, shape):
        right = plain(**call)
    with torch.no_grad():
        dense = plain(**call)
        found = WINDOWED(model)(**call)
    same(found.sample, right.sample)
    same(found.audio_sample, right.audio_sample)
    far(dense.audio_sample, right.audio_sample, "what sound hears of the video")
    names = {
        name
        for name, module in model.named_modules()
        if type(getattr(module, "processor", None)).__name__.startswith("Windowed")
    }
    assert names == {"transformer_blocks.0.attn1", "transformer_blocks.1.attn1"}


@pytest.mark.parametrize("rope_type", ["interleaved", "split"])
@pytest.mark.parametrize("perturbed", [False, True])
def test_variants_of_the_model_are_windowed(rope_type, perturbed):
    config = {"rope_type": rope_type, "perturbed_attn": perturbed, "gated_attn": True, "audio_gated_attn": True}
    model, shape, call = tiny_ltx2(**config), Shape(7, 9, 5, 2, frames=3), ltx2_call(3, 7, 9, 5, 2)
    reference = expected(LTX2, tiny_ltx2(**config), shape, call)
    same(run(WINDOWED(model), call), reference)


def test_a_mask_of_the_video_s_tokens_is_refused():
    model, call = WINDOWED(tiny_ltx2()), ltx2_call(3, 4, 5, 6)
    with pytest.raises(ValueError, match=r"takes no video_self_attention_mask: the window decides.*IC-LoRA"):
        run(model, {**call, "video_self_attention_mask": torch.ones(1, 60, 60)})


def test_coordinates_that_do_not_begin_with_the_video_are_refused():
    model, call = WINDOWED(tiny_ltx2()), ltx2_call(3, 4, 5, 6)
    right = model.rope.prepare_video_coords(1, 3, 4, 5, torch.device("cpu"))
    before = run(model, call)
    assert torch.equal(run(model, {**call, "video_coords": right}), before)
    for wrong in (right.flip(2), right[:, [0, 2, 1]], right[:, :, :40]):
        with pytest.raises(ValueError, match="do not begin with the video of 3 x 4 x 5 tokens"):
            run(model, {**call, "video_coords": wrong})
    with pytest.raises(ValueError, match="needs num_frames, height, width of the latents"):
        run(model, {**call, "video_coords": right, "num_frames": None})
