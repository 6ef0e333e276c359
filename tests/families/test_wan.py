"""Wan 2.1 and 2.2: its pipelines end to end, dense and windowed, to a saved video."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import flexclear
from flexclear.compile import report, why_not_compiled
from flexclear.families import FAMILIES, family_of, register
from flexclear.masks import Anchors, Disc, all_frames, cylinder
from flexclear.runtime.carrying import plan_here
from flexclear.runtime.hooks import entry_hook_of
from flexclear.testing import check_family

from contract.oracle import RADIUS, expected, far, run, same
from contract.pipelines import check_windowed
from contract.rows_video import WAN, WAN_TOKENS, WAN_VACE
from contract.shapes import Shape
from helpers.models_video import tiny_vace, tiny_wan, vace_call, wan_call
from helpers.pipeline_parts import PROMPTS, draw, lora, quiet
from helpers.pipelines_video import SIZE, TEXT, clip, image_parts, picture, saved, wan_parts, wan_vae, without_ftfy

GUIDED = {"guidance_scale": 3.5, "negative_prompt": ["green", "grey fields"], "max_sequence_length": 12}
ONE = {"prompt": PROMPTS[0], "guidance_scale": 3.5, "negative_prompt": "grey fields"}


def text_to_video(monkeypatch, transformer=None, **more):
    from diffusers import WanPipeline

    without_ftfy(monkeypatch, WanPipeline)
    return quiet(WanPipeline(**wan_parts(transformer or tiny_wan(text_dim=TEXT), **more)))


def test_text_to_video_is_windowed_and_saved(monkeypatch, tmp_path):
    pipe = text_to_video(monkeypatch)

    def load():
        pipe.load_lora_weights(lora(pipe.transformer))

    check_windowed(pipe, WAN, load, pipe.unload_lora_weights, **SIZE, **GUIDED)
    flexclear.transform(pipe, r=RADIUS, frame_radius=1, backend="sdpa")
    videos = draw(pipe, **SIZE, **GUIDED)
    assert videos.shape == (2, 9, 3, 48, 64)
    for number, video in enumerate(videos):
        found = saved(video, tmp_path / f"{number}.gif")
        assert [each.size for each in found] == [(64, 48)] * 9


def test_the_first_transform_of_a_pipeline_counts_every_frame_of_the_latents(monkeypatch):
    """81 frames are 21 of latents, and a radius of 21 of them or more sees all: a number of the video's frames is noticed."""
    pipe = text_to_video(monkeypatch)
    flexclear.transform(pipe, r=RADIUS, frame_radius=8, backend="sdpa")
    with pytest.warns(UserWarning, match="frame_radius=8, and this clip has 3 frames of latents"):
        draw(pipe, **SIZE, **GUIDED)


def test_image_to_video_is_windowed_with_the_image_in_cross_attention(monkeypatch):
    from diffusers import WanImageToVideoPipeline

    without_ftfy(monkeypatch, WanImageToVideoPipeline)
    model = tiny_wan(text_dim=TEXT, in_channels=12, image_dim=8, added_kv_proj_dim=40)
    pipe = quiet(WanImageToVideoPipeline(**wan_parts(model, **image_parts(8))))
    options = {**SIZE, **ONE, "image": picture()}
    check_windowed(pipe, WAN, **options)
    flexclear.transform(pipe, r=RADIUS, frame_radius=1, backend="sdpa")
    other = draw(pipe, **{**options, "image": picture(1)})
    assert (draw(pipe, **options) - other).abs().max() > 1e-3, "the image makes no difference"


@pytest.mark.kept
def test_video_to_video_is_windowed(monkeypatch):
    from diffusers import UniPCMultistepScheduler, WanVideoToVideoPipeline

    without_ftfy(monkeypatch, WanVideoToVideoPipeline)
    parts = wan_parts(tiny_wan(text_dim=TEXT))
    parts["scheduler"] = UniPCMultistepScheduler(
        flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    pipe = quiet(WanVideoToVideoPipeline(**parts))
    check_windowed(pipe, WAN, video=clip(), height=48, width=64, num_inference_steps=3, **ONE)


def test_dense_steps_of_video_to_video_count_from_where_it_begins(monkeypatch):
    from diffusers import WanVideoToVideoPipeline

    without_ftfy(monkeypatch, WanVideoToVideoPipeline)
    pipe = quiet(WanVideoToVideoPipeline(**wan_parts(tiny_wan(text_dim=TEXT))))
    flexclear.transform(pipe, r=RADIUS, frame_radius=1, backend="sdpa", dense_steps=(2, 1))
    dense = []
    pipe.transformer.blocks[0].register_forward_pre_hook(lambda *_: dense.append(plan_here().slots[0].mask is None))
    options = {"video": clip(), "height": 48, "width": 64, "prompt": PROMPTS[0], "guidance_scale": 1.0}
    draw(pipe, **options, num_inference_steps=8, strength=0.5)
    assert dense == [True, True, False, True]


def test_a_time_for_each_token_is_windowed_from_text_and_from_an_image(monkeypatch):
    from diffusers import WanImageToVideoPipeline, WanPipeline

    without_ftfy(monkeypatch, WanPipeline)
    without_ftfy(monkeypatch, WanImageToVideoPipeline)
    check_windowed(text_to_video(monkeypatch, expand_timesteps=True), WAN_TOKENS, **SIZE, **GUIDED)
    parts = wan_parts(tiny_wan(text_dim=TEXT), image_encoder=None, image_processor=None, expand_timesteps=True)
    pipe = quiet(WanImageToVideoPipeline(**parts))
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    options = {**SIZE, **ONE, "image": picture()}
    check_windowed(pipe, WAN_TOKENS, **options)
    # The first frame, 3 x 4 tokens, is the image: it is at time 0, in raster order, in which tokens reach the model.
    assert all(times.shape == (1, 36) and not times[:, :12].any() and times[:, 12:].all() for times in seen)


@pytest.mark.kept
def test_a_vae_of_other_factors_is_read_off_the_latents(monkeypatch):
    """Wan 2.2's 5B has one that makes 16 pixels one, and patches besides."""
    vae = wan_vae(patch_size=2, scale_factor_spatial=16, in_channels=12, out_channels=12)
    pipe = text_to_video(monkeypatch, vae=vae)
    check_windowed(pipe, WAN, **{**SIZE, "height": 96, "width": 128}, **GUIDED)
    explained = flexclear.explain(
        flexclear.transform(pipe, r=RADIUS, frame_radius=1), height=96, width=128, num_frames=9
    )
    assert "3 x 3 x 4 = 36 video tokens" in str(explained)


def test_vace_is_windowed_with_its_control_video_and_reference_images(monkeypatch):
    from diffusers import WanVACEPipeline

    without_ftfy(monkeypatch, WanVACEPipeline)
    model = tiny_vace(text_dim=TEXT, vace_in_channels=72)
    pipe = quiet(WanVACEPipeline(**wan_parts(model)))
    options = {**SIZE, **ONE, "video": clip(), "mask": [picture(9).convert("L")] * 9, "reference_images": [picture(12)]}
    check_windowed(pipe, WAN_VACE, **options)


def test_an_image_is_a_video_of_one_frame(monkeypatch):
    pipe = text_to_video(monkeypatch)
    check_windowed(pipe, WAN, **{**SIZE, "num_frames": 1}, **{**GUIDED, "max_sequence_length": 14})


def test_wide_windows_see_all_and_give_the_dense_model():
    model, call = tiny_wan(attention_head_dim=64), wan_call(4, 7, 9, 5, 2)
    dense = run(model, call)
    for r, frames in ((12, 3), (12, "all"), (cylinder(12, 4), None)):
        flexclear.transform(model, r=r, frame_radius=frames, backend="sdpa")
        same(run(model, call), dense, (r, frames))


def test_layers_may_have_windows_of_other_depths_each_in_its_own_order():
    model, shape = tiny_wan(attention_head_dim=64), Shape(6, 9, 5, 2, frames=5)
    call = wan_call(5, 6, 9, 5, 2)
    reference = expected(WAN, tiny_wan(attention_head_dim=64), shape, call)
    flexclear.transform(model, r={"blocks.0": RADIUS, "blocks.1": RADIUS}, frame_radius=1, backend="sdpa")
    same(run(model, call), reference)
    flexclear.transform(model, r={"blocks.0": cylinder(RADIUS, 1), "blocks.1": None}, backend="sdpa")
    mixed = run(model, call)
    far(mixed, reference, "the second layer's window")
    flexclear.transform(model, r=[RADIUS, cylinder(2, 3)], frame_radius=1, backend="sdpa")
    far(run(model, call), mixed, "the second layer's window")


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_frame_counts_alternate(frames):
    model, plain = tiny_wan(), tiny_wan()
    flexclear.transform(model, r=RADIUS, frame_radius=1, backend="sdpa")
    for count in (3, frames, 3):
        shape = Shape(6, 7, 5, 2, frames=count)
        same(run(model, wan_call(count, 6, 7, 5, 2)), expected(WAN, plain, shape, wan_call(count, 6, 7, 5, 2)))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"r": 3}, ValueError, "r=3 does not say which frames.*frame_radius=n.*frame_radius='all'"),
        ({}, ValueError, "r=16 does not say which frames"),
        (
            {"r": 3, "frame_radius": "every"},
            ValueError,
            "frame_radius must be a number of frames or 'all', got 'every'",
        ),
        ({"r": 3, "frame_radius": -1}, ValueError, "frame_radius must be an int from 0 to 1023"),
        ({"r": 3, "frame_radius": 1024}, ValueError, "frame_radius must be an int from 0 to 1023"),
        ({"r": 3, "frame_radius": 1.5}, TypeError, "frame_radius must be an int"),
        (
            {"r": Disc(3)},
            ValueError,
            r"Disc\(radius=3\) is a window for images, and WanTransformer3DModel is a video model",
        ),
        (
            {"r": cylinder(3, 1), "frame_radius": 1},
            ValueError,
            "frame_radius=1 says in which frames a radius applies, but r",
        ),
        ({"r": None, "frame_radius": 1}, ValueError, "r holds no radius"),
        ({"attention": "swin"}, ValueError, "attention='swin' is defined for images"),
        ({"attention": "strided", "frame_radius": 2}, ValueError, "attention='strided' is defined for images"),
        ({"attention": "linear"}, ValueError, "attention='linear' is defined for FluxTransformer2DModel"),
        ({"r": 3, "frame_radius": 1, "down_factor": 2}, ValueError, "down-sampled keys are defined for"),
    ],
)
def test_what_makes_no_sense_for_a_video_is_refused(options, error, says):
    model, call = tiny_wan(), wan_call(3, 5, 6, 4)
    before = run(model, call)
    with pytest.raises(error, match=says):
        flexclear.transform(model, **options)
    assert torch.equal(run(model, call), before)


def test_frames_of_an_image_model_are_refused():
    from helpers.models import tiny_flux

    with pytest.raises(ValueError, match="frame_radius=4: FluxTransformer2DModel makes images, which have no frames"):
        flexclear.transform(tiny_flux(), r=8, frame_radius=4)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 4, 8, 8), r"takes latents of one video, \[batch, channels, frames, height, width\], got \[1, 4, 8, 8\]"),
        ((1, 4, 3, 9, 8), "latents of 3 x 9 x 8 do not divide into the patches of 1 x 2 x 2"),
        ((1, 4, 0, 8, 8), "latents of 0 x 8 x 8 do not divide"),
    ],
)
def test_latents_that_are_no_video_are_refused(shape, says):
    model = flexclear.transform(tiny_wan(), r=3, frame_radius=1)
    with pytest.raises(ValueError, match=says):
        run(model, {**wan_call(3, 4, 4, 5), "hidden_states": torch.zeros(shape)})


def test_control_blocks_have_windows_of_their_own():
    """One in which they are dense is another model."""
    model, call = tiny_vace(), vace_call(3, 6, 7, 5)
    flexclear.transform(model, r=RADIUS, frame_radius=1, backend="sdpa")
    local = run(model, call)
    flexclear.transform(model, r={"blocks": RADIUS, "vace_blocks": None}, frame_radius=1, backend="sdpa")
    far(run(model, call), local, "the window of the control blocks")


def test_an_order_of_rows_is_the_same_in_time_whatever_the_window(monkeypatch):
    """Tokens that are counted grid times text, or in another order, would be another video's: each frame, row and column of
    the output depends on the same of the input alone where a window sees nothing else."""
    model = tiny_wan(num_layers=1)
    flexclear.transform(model, r=1, frame_radius=0, backend="sdpa")
    call = wan_call(4, 5, 6, 3)
    before = run(model, call)
    changed = call["hidden_states"].clone()
    changed[:, :, 2, 4:6, 8:10] += 1  # frame 2, row 2, column 4
    after = run(model, {**call, "hidden_states": changed})
    where = (after - before).abs().amax((0, 1)) > 0
    assert where[2, 4:6, 8:10].all()
    where[2, 4:6, 8:10] = False
    assert not where.any()


@pytest.fixture
def families():
    """Those that there are, afterwards as before."""
    before = list(FAMILIES)
    yield FAMILIES
    FAMILIES[:] = before


def test_check_family_finds_text_or_frames_that_a_declaration_counts_wrongly(families):
    model, call = tiny_wan(num_layers=1), wan_call(3, 8, 9, 5, 2)
    assert len(check_family(model, call, grid=(3, 8, 9)).errors) == 5
    with pytest.raises(AssertionError, match=r"the family reads 3 frames off this call, and there are 9"):
        check_family(model, call, grid=(9, 8, 9))
    with pytest.raises(AssertionError, match=r"the family reads the grids \(\(8, 9\),\) off this call, and they are"):
        check_family(model, call, grid=(3, 16, 18))
    right = family_of(model)
    register(dataclasses.replace(right, joins=True), replace=True)
    with pytest.raises(AssertionError, match="attends over no sequence of 221 tokens, which the family says there is"):
        check_family(model, call, grid=(3, 8, 9))


@pytest.mark.kept
@pytest.mark.skipif(why_not_compiled(torch.device("cpu")) is not None, reason="no compiler")
def test_compiled_flex_attention_has_windows_of_other_orders_in_one_model():
    """And for clips of other sizes."""
    model, plain = (tiny_wan(attention_head_dim=64) for _ in range(2))
    windows = [cylinder(4, 0), all_frames(2)]
    flexclear.transform(model, r=windows, backend="flex")
    flexclear.transform(plain, r=windows, backend="sdpa")
    for sizes in ((8, 16, 9), (7, 11, 12)):
        call = wan_call(*sizes, 7, 2)
        same(run(model, call), run(plain, call), sizes)
    entry = entry_hook_of(model)
    made = entry.plan(model, entry.family.read(model, call, entry._reader), entry.settings.switches, False)
    orders = [slot.order[0] for slot in made.slots]
    assert not torch.equal(orders[0], orders[1]), "both layers have one order"


def test_compiled_blocks_serve_clips_of_other_lengths_and_windows_of_each_layer():
    """Whose orders differ: one graph for each window, of layers that are equal otherwise."""
    model, plain = (tiny_wan() for _ in range(2))
    for each in (model, plain):
        flexclear.transform(each, r=[cylinder(4, 0), all_frames(2)], backend="sdpa")
    torch.compiler.reset()
    before = report()
    try:
        flexclear.optimize(model, backend="eager", dynamic=True)
        made = []
        for sizes in ((8, 16, 9), (7, 11, 12), (2, 6, 23)):
            call = wan_call(*sizes, 70, 2)
            same(run(model, call), run(plain, call), sizes)
            made.append(len(report().since(before).graphs))
        assert made == [2, 2, 2]
    finally:
        torch.compiler.reset()


def test_reference_frames_stay_in_sight_by_anchors():
    """As frames they are seen from as far as others: from further away, each with a window that anchors them."""
    model = tiny_wan(num_layers=1)
    call = wan_call(6, 5, 6, 3)
    changed = call["hidden_states"].clone()
    changed[:, :, 0] += 1

    def reached(window):
        flexclear.transform(model, r=window, backend="sdpa")
        moved = run(model, {**call, "hidden_states": changed}) - run(model, call)
        return (moved.abs().amax((0, 1, 3, 4)) > 0).tolist()

    assert reached(cylinder(2, 1)) == [True, True, False, False, False, False]
    assert reached(cylinder(2, 1) | Anchors((0,))) == [True] * 6
