"""SDEdit stages are diffusers' image-to-image pipelines, called with the released or the given settings."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

import flexclear
from flexclear.highres import upscale_cascade
from flexclear.highres.stages import RELEASED
from flexclear.highres.state import shifted

PROMPT = "a red apple on a blue background"
KINDS = {
    "flux": ("FluxPipeline", "FluxImg2ImgPipeline"),
    "sd3": ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
}


def by_hand(pipe, name, shift, seed, **arguments):
    """A pipeline of class ``name`` on the same parts, with a constant shift (None: the scheduler as it is)."""
    import diffusers

    parts = {part: value for part, value in pipe.components.items() if value is not None}
    changed = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
    parts["scheduler"] = type(pipe.scheduler).from_config(pipe.scheduler.config, **changed)
    made = getattr(diffusers, name)(**parts)
    made.set_progress_bar_config(disable=True)
    return made(
        PROMPT, generator=torch.Generator().manual_seed(seed), max_sequence_length=16, **arguments
    ).images[0]  # fmt: skip


def same(picture, other):
    return np.array_equal(np.asarray(picture), np.asarray(other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(24, 32, 48), ((48, 32), (72, 48))])
def test_a_cascade_is_the_pipelines_called_by_hand(request, kind, sizes):
    pipe = request.getfixturevalue(kind)
    flexclear.transform(pipe, r=3, backend="sdpa")
    done = upscale_cascade(pipe, PROMPT, sizes, steps=2, max_sequence_length=16, seed=5, tile=128)
    text_to_image, image_to_image = KINDS[kind]
    before = None
    for number, (size, picture) in enumerate(zip(sizes, done.images, strict=True)):
        height, width = size if isinstance(size, tuple) else (size, size)
        assert picture.size == (width, height)
        shared = {"height": height, "width": width, "num_inference_steps": 2}
        if before is None:
            expected = by_hand(pipe, text_to_image, None, 5, **shared)
        else:
            image = before.resize((width, height), Image.Resampling.BICUBIC)
            switches = {"proportional_attention": True, "training_tokens": 64 + 16 + 77 * (kind == "sd3")}
            switches |= {"ntk_factor": 10.0} if kind == "flux" else {}
            with flexclear.override(**switches):
                expected = by_hand(
                    pipe, image_to_image, 3.0, 5 + number, image=image, strength=0.7, guidance_scale=7.5, **shared
                )
        assert same(picture, expected)
        before = picture


def test_the_schedule_is_the_one_that_the_released_notebook_runs():
    """It switches the dynamic shift off and sets a time_shift that no scheduler reads, so FLUX.1-dev's own 3 holds."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    flux_1_dev = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    theirs, ours = (FlowMatchEulerDiscreteScheduler(**flux_1_dev) for _ in range(2))
    theirs.config.use_dynamic_shifting = False
    theirs.config.time_shift = 10
    ours = shifted(ours, RELEASED["sdedit"]["shift"])
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20), mu=1.15)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert ours.sigmas[6].item() == pytest.approx(0.875), "where a strength of 0.7 begins"


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_has_settings_of_its_own(request, kind, photo):
    pipe = request.getfixturevalue(kind)
    flexclear.transform(pipe, r=5, backend="sdpa")
    settings = {"steps": [2, 4], "strength": [0.5, 1.0], "guidance": [2.0, None], "shift": [2.0, "own"]}
    done = upscale_cascade(
        pipe,
        PROMPT,
        [80, 128],
        image=photo,
        r=["keep", 2],
        proportional_attention=False,
        ntk_factor=1,
        max_sequence_length=16,
        tile=128,
        **settings,
    )
    first, second = done.stages
    assert (first.height, first.width, second.height, second.width) == (64, 80, 96, 128)
    assert (first.guidance, second.guidance) == (2.0, 7.5)
    assert (set(first.windows), set(second.windows)) == ({"disc_r5"}, {"disc_r2"})
    name = KINDS[kind][1]
    one = by_hand(
        pipe, name, 2.0, 0, image=photo.resize((80, 64), 3), height=64, width=80, num_inference_steps=2, strength=0.5,
        guidance_scale=2.0,
    )  # fmt: skip
    assert same(done.images[0], one)
    flexclear.transform(pipe, r=2, backend="sdpa")
    two = by_hand(
        pipe, name, None, 1, image=one.resize((128, 96), 3), height=96, width=128, num_inference_steps=4, strength=1.0,
        guidance_scale=7.5,
    )  # fmt: skip
    assert same(done.image, two)


def test_a_plain_pipeline_runs_dense_under_the_switches_and_is_plain_again(flux, photo):
    processors = flux.transformer.attn_processors
    arguments = {"image": photo, "steps": 2, "max_sequence_length": 16, "tile": 128}
    done = upscale_cascade(flux, PROMPT, [96], **arguments)
    assert all(flux.transformer.attn_processors[name] is processor for name, processor in processors.items())
    assert not flux.transformer._forward_pre_hooks
    unswitched = upscale_cascade(flux, PROMPT, [96], ntk_factor=1, proportional_attention=False, **arguments)
    assert not same(done.image, unswitched.image)
    flexclear.transform(flux, r=None, backend="sdpa")
    assert same(upscale_cascade(flux, PROMPT, [96], **arguments).image, done.image)
    wide = upscale_cascade(flux, PROMPT, [96], r=100, **arguments)
    assert np.abs(np.asarray(wide.image, np.int16) - np.asarray(done.image, np.int16)).max() <= 1


def test_guidance_without_an_input_for_it_is_true_guidance_with_a_negative_prompt(embedded):
    drawn = [
        upscale_cascade(embedded, PROMPT, [64], steps=2, max_sequence_length=16, **given).image
        for given in ({}, {"negative_prompt": "a rocket"}, {"negative_prompt": "a rocket", "guidance": 5.0})
    ]
    hand = by_hand(
        embedded, "FluxPipeline", None, 0, height=64, width=64, num_inference_steps=2, negative_prompt="a rocket",
        true_cfg_scale=5.0,
    )  # fmt: skip
    assert same(drawn[2], hand)
    assert not same(drawn[0], drawn[1])
    assert not same(drawn[1], drawn[2])


def test_text_is_encoded_once(pipe):
    calls = []
    with contextlib.ExitStack() as stack:
        for name, part in pipe.components.items():
            if name.startswith("text_encoder"):
                handle = part.register_forward_hook(lambda module, args, out, name=name: calls.append(name))
                stack.callback(handle.remove)
        upscale_cascade(pipe, PROMPT, [32, 48, 64], steps=2, guidance=1.0, max_sequence_length=16, tile=128)
        assert sorted(calls) == sorted({*calls}), "each encoder once: there is no negative prompt to encode"
        assert len(calls) == len([name for name in pipe.components if name.startswith("text_encoder")])


def test_dense_steps_count_the_steps_of_each_stage(flux, photo):
    flexclear.transform(flux, r=2, backend="sdpa")
    arguments = {"image": photo, "steps": 4, "strength": 0.75, "max_sequence_length": 16, "tile": 128}
    windowed = upscale_cascade(flux, PROMPT, [96], **arguments).image
    with flexclear.override(dense_steps=(3, 0)):
        all_dense = upscale_cascade(flux, PROMPT, [96], **arguments).image
    with flexclear.override(dense_steps=(1, 0)):
        first_dense = upscale_cascade(flux, PROMPT, [96], **arguments).image
    flexclear.transform(flux, r=None, backend="sdpa")
    dense = upscale_cascade(flux, PROMPT, [96], **arguments).image
    assert same(all_dense, dense)
    assert not same(windowed, dense)
    assert not same(first_dense, dense)
    assert not same(first_dense, windowed)
