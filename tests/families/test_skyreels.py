"""SkyReels V2: its pipelines end to end, a time for each frame included, and what is refused."""

from __future__ import annotations

import functools

import pytest
import torch

import flexclear

from contract.oracle import RADIUS, run
from contract.pipelines import check_windowed
from contract.rows_video import SKYREELS_V2
from helpers.models_video import skyreels_call, tiny_skyreels
from helpers.pipeline_parts import PROMPTS, draw, lora, quiet
from helpers.pipelines_video import SIZE, TEXT, clip, image_parts, picture, saved, wan_parts, without_ftfy

ONE = {"prompt": PROMPTS[0], "guidance_scale": 3.5, "negative_prompt": "grey fields"}
SHORT = {**ONE, "max_sequence_length": 12}
WINDOWED = functools.partial(flexclear.transform, r=RADIUS, frame_radius=1, backend="sdpa")


def pipeline(name, monkeypatch, transformer=None, **more):
    import diffusers

    kind = getattr(diffusers, name)
    without_ftfy(monkeypatch, kind)
    parts = wan_parts(tiny_skyreels(text_dim=TEXT) if transformer is None else transformer, **more)
    parts["scheduler"] = diffusers.UniPCMultistepScheduler(
        flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    return quiet(kind(**parts))


def test_text_to_video_is_windowed(monkeypatch):
    pipe = pipeline("SkyReelsV2Pipeline", monkeypatch)
    check_windowed(pipe, SKYREELS_V2, **SIZE, **SHORT)


@pytest.mark.kept
def test_image_to_video_is_windowed_with_the_image_in_cross_attention(monkeypatch):
    model = tiny_skyreels(text_dim=TEXT, in_channels=12, image_dim=8, added_kv_proj_dim=40)
    pipe = pipeline("SkyReelsV2ImageToVideoPipeline", monkeypatch, model, **image_parts(8))
    check_windowed(pipe, SKYREELS_V2, **SIZE, **ONE, image=picture())


def test_diffusion_forcing_is_windowed_in_clips_that_overlap_and_saved(monkeypatch, tmp_path):
    """The later clip has the end of the first before it."""
    pipe = pipeline("SkyReelsV2DiffusionForcingPipeline", monkeypatch)

    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_windowed(pipe, SKYREELS_V2, load, pipe.unload_lora_weights, **SIZE, **SHORT)
    longer = {**SIZE, "num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "addnoise_condition": 20}
    check_windowed(pipe, SKYREELS_V2, **longer, **SHORT)
    found = saved(draw(WINDOWED(pipe), **longer, **SHORT)[0], tmp_path / "video.gif")
    assert [each.size for each in found] == [(64, 48)] * 17


@pytest.mark.kept
def test_diffusion_forcing_from_an_image_and_from_a_video_is_windowed(monkeypatch):
    pipe = pipeline("SkyReelsV2DiffusionForcingImageToVideoPipeline", monkeypatch)
    check_windowed(pipe, SKYREELS_V2, **SIZE, **SHORT, image=picture())
    pipe = pipeline("SkyReelsV2DiffusionForcingVideoToVideoPipeline", monkeypatch)
    options = {**SIZE, "num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "video": clip(9)}
    check_windowed(pipe, SKYREELS_V2, **options, **SHORT)


@pytest.mark.kept
def test_frames_that_are_denoised_one_after_the_other_are_windowed(monkeypatch):
    """Each at its own time, without causal blocks."""
    pipe = pipeline("SkyReelsV2DiffusionForcingPipeline", monkeypatch)
    check_windowed(pipe, SKYREELS_V2, **SIZE, **SHORT, ar_step=1)


def test_causal_attention_over_blocks_of_frames_is_refused(monkeypatch):
    pipe = WINDOWED(pipeline("SkyReelsV2DiffusionForcingPipeline", monkeypatch))
    options = {**SIZE, **SHORT, "num_frames": 17, "ar_step": 1}
    with pytest.raises(ValueError, match=r"causal over blocks of 2 frames \(num_frame_per_block, causal_block_size of"):
        draw(pipe, **options, causal_block_size=2)


def test_dense_steps_are_refused_where_each_frame_has_a_scheduler_of_its_own(monkeypatch):
    pipe = pipeline("SkyReelsV2DiffusionForcingPipeline", monkeypatch)
    with pytest.raises(ValueError, match="of its own for each frame, which is at another step"):
        WINDOWED(pipe, dense_steps=(1, 0))
    WINDOWED(pipe)
    with flexclear.override(dense_steps=(1, 0)), pytest.raises(ValueError, match="Leave dense_steps out"):
        draw(pipe, **SIZE, **SHORT)
    WINDOWED(pipeline("SkyReelsV2Pipeline", monkeypatch), dense_steps=(1, 0))


def test_times_of_frames_are_those_of_their_own_tokens():
    """In one layer that sees nothing but the own token, a frame at another time is changed, and no other."""
    model = tiny_skyreels(num_layers=1)
    flexclear.transform(model, r=1, frame_radius=0, backend="sdpa")
    call = skyreels_call(4, 5, 6, 3, times="frames")
    later = call["timestep"].clone()
    later[:, 2] += 300
    changed = (run(model, {**call, "timestep": later}) - run(model, call)).abs().amax((0, 1, 3, 4)) > 0
    assert changed.tolist() == [False, False, True, False]


@pytest.mark.kept
def test_sample_rates_are_taken(monkeypatch):
    model = tiny_skyreels(text_dim=TEXT, inject_sample_info=True)
    pipe = pipeline("SkyReelsV2DiffusionForcingPipeline", monkeypatch, model)
    WINDOWED(pipe)
    slow, fast = (draw(pipe, **SIZE, **SHORT, fps=fps) for fps in (16, 24))
    assert not torch.equal(slow, fast)
