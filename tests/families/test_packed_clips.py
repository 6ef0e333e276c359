"""MiniMax-H3 and Cosmos 3: videos in one sequence with keyframes, sound and text, which may not be mixed up."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import flexclear
from flexclear.compile.kernels import Kernel
from flexclear.families import family_of
from flexclear.masks import Layout, cylinder, dense_mask
from flexclear.runtime.grid import GridReader
from flexclear.runtime.plan import build_plan

from contract.oracle import RADIUS, TOLERANCE, differ, far, run
from contract.pipelines import STEPS
from contract.row import FRAME_RADIUS
from helpers import models_joint_video as models
from helpers import pipelines_joint_video as pipelines
from helpers.pipeline_parts import PROMPTS


def facts(model, call):
    return family_of(model).read(model, call, GridReader())


PACKED = {
    "minimax_h3": (models.tiny_minimax_h3, models.minimax_h3_call),
    "cosmos3": (models.tiny_cosmos3, models.cosmos3_call),
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("minimax_h3", {"keyframes": ("first", "last")}), ("minimax_h3", {"sound": 3}), ("cosmos3", {"sound": 5})],
    ids=str,
)
def test_a_packed_sequence_is_windowed_as_its_positions_say(kind, options):
    """``Layout.from_positions`` of every token's own place, where the family gives a whole grid and where it begins."""
    build, make = PACKED[kind]
    found = facts(build(), make(3, 4, 5, 7, **options))
    layout = Layout(4, 5, found.text_lens["joint"], order="raster", frames=found.frames)
    length, count = layout.seq_len, 3 * 4 * 5
    places = torch.full((length, 3), 99)
    places[found.start : found.start + count] = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(5))
    local = torch.zeros(length, dtype=torch.bool)
    local[found.start : found.start + count] = True
    packed = Layout.from_positions(places, local).with_order("raster")
    window = cylinder(2, 1)
    wanted = torch.empty(length, length, dtype=torch.bool)
    whole = packed.whole_permutation()
    wanted[whole[:, None], whole] = dense_mask(packed, window)
    plan = build_plan(layout, window, "sdpa", Kernel((32, 32)), torch.device("cpu"), backward=False)
    there, _ = plan.packed_order(found.start) or (torch.arange(length),) * 2
    ours = torch.empty_like(wanted)
    ours[there[:, None], there] = plan.mask
    assert torch.equal(ours, wanted)


def test_keyframes_of_minimax_h3_are_no_frames_of_its_video():
    """They share times and places with the first and the last, and see and are seen by all."""
    for keyframes in ((), ("first",), ("first", "last")):
        for sound in (0, 4):
            call = models.minimax_h3_call(3, 4, 5, 7, sound=sound, keyframes=keyframes)
            found = facts(models.tiny_minimax_h3(), call)
            assert (found.frames, found.grids) == (3, ((4, 5),))
            assert found.start == 7 + 20 * len(keyframes) + 2 * sound
            assert found.text_lens == {"joint": found.start}


def h3(**changes):
    return lambda call: {name: change(call[name].clone()) for name, change in changes.items()}


def shifted(positions):
    positions[-1] = positions[-2]
    return positions


def twice(indices):
    indices[-1] = indices[-2]
    return indices


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (h3(position_ids=shifted), "with each token at its own position"),
        (h3(position_ids=lambda given: given[:-1]), "video_indices names number"),
        (h3(video_indices=twice), "name a row of the sequence more than once"),
        (h3(video_indices=lambda given: given[:0]), r"must be of shape \[tokens\] and not empty"),
    ],
)
def test_packed_positions_that_are_no_video_are_refused(change, says):
    model = flexclear.transform(models.tiny_minimax_h3(), r=RADIUS, frame_radius=1, backend="sdpa")
    call = models.minimax_h3_call(3, 4, 5, 7)
    with pytest.raises(ValueError, match=says):
        run(model, {**call, **change(call)})
    run(model, call)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vision_tokens": []}, "needs vision_tokens as a list of latents"),
        ({"vision_token_shapes": [(3, 5, 4), (3, 5, 4)]}, "takes one clip"),
        ({"vision_token_shapes": [(3, 5, 5)]}, "3 x 5 x 5 = 75 places"),
        ({"vision_sequence_indexes": torch.arange(3, 63)}, "not in the sequence of 67 tokens behind the 7"),
        ({"vision_sequence_indexes": torch.arange(66, 6, -1)}, "are not consecutive places"),
    ],
)
def test_calls_of_cosmos_3_that_do_not_fit_are_refused(change, says):
    model = flexclear.transform(models.tiny_cosmos3(), r=RADIUS, frame_radius=1, backend="sdpa")
    call = models.cosmos3_call(3, 4, 5, 7)
    with pytest.raises(ValueError, match=says):
        run(model, {**call, **change})
    run(model, call)


def test_a_sequence_of_cosmos_3_that_is_shared_out_is_refused():
    model = flexclear.transform(models.tiny_cosmos3(), r=RADIUS, frame_radius=1, backend="sdpa")
    model._cp_shard_fn = lambda *parts: parts
    with pytest.raises(ValueError, match="splits its sequence among several processes"):
        run(model, models.cosmos3_call(3, 4, 5, 7))


@contextlib.contextmanager
def window_before_sound(text_len, grid, sound):
    """Dense attention under the window of a video that lies between text and sound."""
    frame, row, column = torch.cartesian_prod(*map(torch.arange, grid)).T
    near = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2 < RADIUS**2
    near &= (frame[:, None] - frame).abs() <= FRAME_RADIUS
    count = len(frame)
    mask = torch.ones(count + sound, text_len + count + sound, dtype=torch.bool)
    mask[:count, text_len : text_len + count] = near
    plain, used = F.scaled_dot_product_attention, []

    def attend(query, key, value, attn_mask=None, **options):
        if key.shape[-2] == mask.shape[1]:
            used.append(query.shape[-2])
            attn_mask = mask
        return plain(query, key, value, attn_mask=attn_mask, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield
    assert set(used) == {count + sound}


def test_cosmos_3_makes_the_video_and_the_sound_of_the_dense_mask():
    pipe = pipelines.cosmos3_with_sound()
    texts, sounds = set(), set()

    def look(model, args, kwargs):
        texts.add(kwargs["und_len"])
        sounds.add(len(kwargs["sound_sequence_indexes"]))

    handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)

    def draw():
        return pipelines.draw_with_sound(pipe, decode=False, prompt=PROMPTS[0], guidance_scale=1.0)

    dense = draw()
    handle.remove()
    [text_len], [sound] = texts, sounds
    with window_before_sound(text_len, (3, 3, 5), sound):
        right = draw()
    flexclear.transform(pipe, r=RADIUS, frame_radius=FRAME_RADIUS, backend="sdpa")
    found = draw()
    for what, before, wanted, got in zip(("video", "sound"), dense, right, found, strict=True):
        far(before[None], wanted[None], f"the window, in the {what}")
        assert differ(got, wanted) <= STEPS * TOLERANCE, (what, differ(got, wanted))
    _, decoded = pipelines.draw_with_sound(pipe, prompt=PROMPTS[0])
    assert decoded.shape == (2, sound * 2400)
    flexclear.restore(pipe)
    for before, again in zip(dense, draw(), strict=True):
        assert torch.equal(before, again)
