"""LTX-Video: its pipelines end to end, dense and windowed; where its tokens sit."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import flexclear

from contract.oracle import RADIUS, TOLERANCE, differ, expected, far, run, same, under
from contract.pipelines import STEPS, check_windowed
from contract.rows_video import LTX
from contract.shapes import Shape
from helpers.models_latents import settle
from helpers.models_video import ltx_call, tiny_ltx
from helpers.pipeline_parts import PROMPTS, byte_tokenizer, draw, lora, quiet, t5
from helpers.pipelines_video import picture, saved

SIZE = {"height": 32, "width": 64, "num_frames": 9}
"""Of a video whose latents are 3 x 8 x 16: its VAE makes 4 pixels and 4 frames one, but the first frame."""
GUIDED = {"guidance_scale": 3.0, "negative_prompt": ["green", "grey fields"], "max_sequence_length": 16}
WINDOWED = functools.partial(flexclear.transform, r=RADIUS, frame_radius=1, backend="sdpa")


def parts(**config):
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(3)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return {
        "tokenizer": byte_tokenizer(starts=False),
        "text_encoder": t5(width=16),
        "vae": settle(vae, 3),
        "transformer": tiny_ltx(caption_channels=16, **config),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def test_text_to_video_is_windowed_and_saved(tmp_path):
    from diffusers import LTXPipeline

    pipe = quiet(LTXPipeline(**parts()))

    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_windowed(pipe, LTX, load, pipe.unload_lora_weights, **SIZE, **GUIDED)
    videos = draw(WINDOWED(pipe), **SIZE, **GUIDED)
    assert videos.shape == (2, 9, 3, 32, 64)
    found = saved(videos[0], tmp_path / "video.gif")
    assert [each.size for each in found] == [(64, 32)] * 9


def test_image_to_video_is_windowed_with_its_first_frame_at_time_0():
    from diffusers import LTXImageToVideoPipeline

    pipe = quiet(LTXImageToVideoPipeline(**parts()))
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["timestep"]), with_kwargs=True
    )
    options = {**SIZE, **GUIDED, "negative_prompt": "green", "prompt": PROMPTS[0], "image": picture(0, 32, 64)}
    check_windowed(pipe, LTX, **options)
    assert all(not times[:, :128].any() and times[:, 128:].all() for times in seen)


def conditions(*indices):
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    return [LTXVideoCondition(image=picture(number, 32, 64), frame_index=index) for number, index in enumerate(indices)]


@pytest.mark.parametrize(("indices", "beside"), [((0,), 0), ((0, 8), 128), ((4, 8), 256)])
def test_a_pipeline_of_conditions_is_windowed_and_conditions_of_later_frames_are_seen_by_all(indices, beside):
    """Those of the first frame are tokens of the video."""
    from diffusers import LTXConditionPipeline

    pipe = quiet(LTXConditionPipeline(**parts()))
    pipe.scheduler = type(pipe.scheduler)(use_dynamic_shifting=False)
    options = {**SIZE, **GUIDED, "prompt": PROMPTS[0], "negative_prompt": "green", "conditions": conditions(*indices)}
    dense = draw(pipe, **options)
    row = dataclasses.replace(LTX, text_lens=lambda shape: (beside,))
    plain = pipe.transformer.forward

    def forward(*args, **call):
        with under(row, Shape(8, 16, 16, 2, frames=3)):
            return plain(*args, **call)

    pipe.transformer.forward = forward
    reference = draw(pipe, **options)
    del pipe.transformer.forward
    far(dense, reference, "the window")
    found = draw(WINDOWED(pipe), **options)
    assert differ(found, reference) <= STEPS * TOLERANCE
    assert torch.equal(draw(flexclear.restore(pipe), **options), dense)


def coordinates(frames, height, width, later=()):
    """Positions as the pipeline makes them of 8 frames and 32 pixels a latent, conditions at later frames first."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(side)) for side in (frames, height, width)), indexing="ij"))
    grid = grid.flatten(1) * torch.tensor([8.0, 32, 32])[:, None]
    grid[0] = (grid[0] - 7).clamp(min=0)
    before = [grid[:, : height * width] + torch.tensor([float(index), 0, 0])[:, None] for index in later]
    found = torch.cat([*before, grid], 1)
    found[0] /= 25
    return found[None]


@pytest.mark.parametrize("later", [(), (8,), (5, 8)])
@pytest.mark.parametrize("sizes", [(3, 5, 7), (1, 5, 7), (4, 1, 6), (4, 6, 1), (2, 1, 1)])
def test_the_grid_is_read_off_coordinates(sizes, later):
    model, frames, height, width = WINDOWED(tiny_ltx()), *sizes
    call = ltx_call(frames, height, width, 6)
    extra = len(later) * height * width
    tokens = torch.cat([torch.randn(1, extra, 4), call["hidden_states"]], 1)
    call = {**call, "hidden_states": tokens, "timestep": torch.full((1, 1), 500.0)}
    call["video_coords"] = coordinates(*sizes, later)
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del call[name]
    shape = Shape(height, width, 6, frames=frames)
    row = dataclasses.replace(LTX, text_lens=lambda shape: (extra,), other_lens=lambda shape: ())
    found = run(model, call)
    flexclear.restore(model)
    same(found, expected(row, model, shape, call))


def test_coordinates_that_are_no_video_are_refused():
    model = WINDOWED(tiny_ltx())
    call = ltx_call(3, 5, 7, 6)
    right = coordinates(3, 5, 7)
    shuffled = right[:, :, torch.randperm(105, generator=torch.Generator().manual_seed(0))]
    sideways = right[:, [0, 2, 1]]
    looping = torch.cat([right[:, :, :35], right[:, :, :70]], 2)  # an earlier time at the end
    for wrong in (shuffled, sideways, looping, right.flip(2)):
        with pytest.raises(ValueError, match="are not a video in raster order that begins at the first time"):
            run(model, {**call, "video_coords": wrong})
    with pytest.raises(
        ValueError, match="do not hold the 3 x 5 x 7 = 105 tokens of the video that video_coords describe"
    ):
        run(model, {**call, "video_coords": right, "hidden_states": call["hidden_states"][:, :70]})
    with pytest.raises(ValueError, match="hold numbers that are not finite"):
        run(model, {**call, "video_coords": right / 0})
    with pytest.raises(ValueError, match="differ from sample to sample"):
        run(model, {**ltx_call(3, 5, 7, 6, 2), "video_coords": torch.cat([right, right + 1])})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"num_frames": 17},
            "do not hold the 17 x 5 x 7 = 595 tokens of the video that num_frames and height and width",
        ),
        ({"height": 7, "width": 6}, "do not hold the 3 x 7 x 6 = 126 tokens"),
        ({"num_frames": 2}, "do not hold the 2 x 5 x 7 = 70 tokens"),
        (
            {"width": None},
            "needs num_frames, height, width of the latents to know where 105 tokens sit, got 3, 5, None",
        ),
        ({"hidden_states": torch.zeros(1, 4, 3, 5, 7)}, r"takes tokens of a video, \[batch, tokens, channels\]"),
    ],
)
def test_sizes_that_are_not_the_tokens_are_refused(changed, says):
    """Frames of the video in place of those of its latents, for one."""
    model = WINDOWED(tiny_ltx())
    with pytest.raises(ValueError, match=says):
        run(model, {**ltx_call(3, 5, 7, 6), **changed})


def test_a_mask_among_the_arguments_is_refused():
    model = WINDOWED(tiny_ltx())
    with pytest.raises(ValueError, match="attention_kwargs holds an attention_mask"):
        run(model, {**ltx_call(3, 5, 7, 6), "attention_kwargs": {"attention_mask": torch.ones(1, 105)}})


def test_an_ntk_factor_of_one_call_is_refused():
    model = WINDOWED(tiny_ltx())
    with flexclear.override(ntk_factor=4.0), pytest.raises(ValueError, match="an NTK factor is not defined"):
        run(model, ltx_call(3, 5, 7, 6))
