"""Distilling a window into a video model: the loss falls, runs go on exactly, samples that do not fit are named."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import flexclear
from flexclear.distill import LossConfig, MemorySamples, OptimizerConfig, Sample, distill
from flexclear.distill.batches import BatchMaker
from flexclear.distill.calls import wan_call
from flexclear.distill.capture import capture, compared_layers
from flexclear.distill.config import HeldOutConfig, SheetConfig, TimestepConfig
from flexclear.distill.losses import Objective
from flexclear.distill.students import make_teacher, trained_parameters
from flexclear.masks import Layout, cylinder, dense_mask

from helpers.models_latents import CHANNELS, TEXT
from helpers.models_video import tiny_wan

FRAMES, HEIGHT, WIDTH, TEXT_LEN = 3, 12, 16, 5


def video_samples(count=6, frames=FRAMES, channels=CHANNELS, text_width=TEXT, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    shape = (channels, frames, HEIGHT, WIDTH)
    made = [Sample(noise(*shape), noise(*shape) - 4, noise(TEXT_LEN, text_width), caption=str(n)) for n in range(count)]
    return MemorySamples(made, **options)


@pytest.fixture
def clips(settings):
    """Settings of a run over clips; keyword arguments replace them."""

    def make(output="run", **changed):
        # Latents drawn at random have nothing to denoise: what is learnt here is to stay with the teacher.
        options = {"frame_radius": 1, "losses": LossConfig(flow=0.0), **changed}
        return settings(output, optimizer=OptimizerConfig("adamw", learning_rate=3e-3), **options)

    return make


def call(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT_LEN, TEXT, generator=generator),
        "timestep": torch.tensor([500.0]),
    }


def output(model):
    with torch.no_grad():
        return model(**call()).sample


def seen(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_the_loss_of_a_window_falls_and_the_file_holds_what_was_trained(clips):
    student = tiny_wan()
    done = distill(student, clips(steps=20, held_out=HeldOutConfig(count=2, every=10)), video_samples(8))
    losses = [record["loss"] for record in done.held_out]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    loaded = flexclear.transform(tiny_wan(), r=2, frame_radius=1, backend="sdpa")
    before = output(loaded)
    flexclear.load_weights(loaded, done.weights)
    assert torch.equal(output(loaded), output(student))
    assert (output(loaded) - before).abs().max() > 1e-3


@pytest.mark.parametrize("changed", [{}, {"train": "lora", "ema": 0.9}], ids=["projections", "lora"])
def test_a_run_in_two_parts_is_the_run_in_one(clips, changed):
    whole, parts = tiny_wan(), [tiny_wan(), tiny_wan()]
    config = clips("whole", **changed)
    expected = distill(whole, config, video_samples())
    split = dataclasses.replace(config, output=config.output.with_name("parts"))
    first = distill(parts[0], dataclasses.replace(split, steps=3), video_samples())
    second = distill(parts[1], split, video_samples())
    assert seen(first.losses + second.losses) == seen(expected.losses)
    written, again = load_file(expected.weights), load_file(second.weights)
    assert written.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in written.items())
    assert all(torch.equal(a, b) for a, b in zip(*map(parameters, (whole, parts[1])), strict=True))


def parameters(model):
    return list(trained_parameters(model).values())


def test_student_and_teacher_are_compared_in_one_order_of_tokens(clips):
    """The attention loss of a window that holds every token of every frame is nought; the tokens' own order hides nothing."""
    model = tiny_wan()
    teacher = make_teacher(model)
    flexclear.transform(model, r=20, frame_radius="all", backend="sdpa")
    maker = BatchMaker(video_samples(), range(6), 2, 0, TimestepConfig())
    losses = Objective(model, teacher, clips().losses)(maker.make(0))
    assert losses.attention < 1e-9
    assert losses.prediction < 1e-9
    flexclear.transform(model, r=2, frame_radius=1, backend="sdpa")
    batch = maker.make(0)
    with torch.no_grad(), capture(model, compared_layers(model, 1)) as own:
        model(**wan_call(model, batch, 0.0))
    plain = copy.deepcopy(teacher)
    mask = dense_mask(Layout(HEIGHT // 2, WIDTH // 2, 0, order="raster", frames=FRAMES), cylinder(2, 1))
    attend = torch.nn.functional.scaled_dot_product_attention

    def masked(query, key, value, **options):
        if key.shape[-2] == mask.shape[-1]:
            options["attn_mask"] = mask
        return attend(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), capture(plain, compared_layers(plain, 1)) as theirs:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
        plain(**wan_call(plain, batch, 0.0))
    for name, layer in own.items():
        assert (layer.outputs[0] - theirs[name].outputs[0]).abs().max() <= 1e-4, name


def test_flow_is_noise_minus_latents_at_times_of_a_thousand(clips):
    samples = video_samples(2, scaling_factor=(0.5, 1.0, 2.0, 4.0), shift_factor=(0.1, 0.2, 0.3, 0.4))
    batch = BatchMaker(samples, range(2), 2, 0, TimestepConfig(), drawn=False).make(0)
    means = torch.stack([sample.mean for sample in samples.samples])
    order = [0, 1] if (batch.prompt_embeds[0] == samples[0].prompt_embeds).all() else [1, 0]
    shift, scaling = (torch.tensor(f).view(-1, 1, 1, 1) for f in (samples.shift_factor, samples.scaling_factor))
    assert torch.allclose(batch.latents, ((means - shift) * scaling)[order])
    arguments = wan_call(tiny_wan(), batch, 5.0)
    sigmas = batch.sigmas.view(-1, 1, 1, 1, 1)
    assert torch.equal(arguments["timestep"], batch.sigmas * 1000)
    assert torch.allclose(arguments["hidden_states"], batch.latents + sigmas * (batch.noise - batch.latents), atol=1e-6)
    model = flexclear.transform(tiny_wan(), r=2, frame_radius=1, backend="sdpa")
    losses = Objective(model, make_teacher(tiny_wan()), LossConfig())(batch)
    with torch.no_grad():
        predicted = model(**arguments)[0]
    assert torch.allclose(losses.flow, (predicted - (batch.noise - batch.latents)).square().mean())


BAD = {
    "channels": ({"channels": 3}, "sample 0 has 3 latent channels, the model takes 4"),
    "text": ({"text_width": 16}, "sample 0 has 16 text features, the model takes 12"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_clips_that_do_not_fit_the_model_are_named(clips, changed, message):
    with pytest.raises(ValueError, match=message):
        distill(tiny_wan(), clips(), video_samples(**changed))


def test_images_for_a_video_model_and_clips_for_an_image_model_are_named(clips, samples, model):
    with pytest.raises(ValueError, match=r"sample 0 has 3 dimensions of latents, the model takes 4, \[C, F, h, w\]"):
        distill(tiny_wan(), clips(), samples)
    with pytest.raises(ValueError, match="sample 0 has 4 dimensions of latents, the model takes 3"):
        distill(model, clips(frame_radius=None), video_samples())
    with pytest.raises(ValueError, match="frame_radius=1: FluxTransformer2DModel makes images"):
        distill(model, clips(), samples)


def test_what_cannot_be_distilled_is_named(clips):
    with pytest.raises(ValueError, match="does not say which frames of a video are seen"):
        distill(tiny_wan(), clips(frame_radius=None), video_samples())
    with pytest.raises(ValueError, match="an image's among them, which training does not give it"):
        distill(tiny_wan(in_channels=9), clips(), video_samples())
    with pytest.raises(TypeError, match=r"has 2 transformers.*pass pipe.transformer or"):
        distill(SimpleNamespace(transformer=tiny_wan(), transformer_2=tiny_wan()), clips(), video_samples())
    sheets = SheetConfig(every=1, prompts=("a",))
    with pytest.raises(ValueError, match=r"sheets.every draws images"):
        distill(SimpleNamespace(transformer=tiny_wan()), clips(sheets=sheets), video_samples())
    with pytest.raises(ValueError, match="frame_radius must be a number of frames or 'all', got 'some'"):
        distill(tiny_wan(), clips(frame_radius="some"), video_samples())


def test_factors_that_are_not_one_for_each_channel_are_named():
    with pytest.raises(ValueError, match="scaling_factor has 2 numbers, and sample 0 4 channels"):
        video_samples(scaling_factor=(1.0, 2.0))
    with pytest.raises(ValueError, match="shift_factor must be a finite number, or a tuple of one for each channel"):
        video_samples(shift_factor=float("nan"))
