"""A cascade resumes, repeats, refuses and gives back what it changed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import flexclear
from flexclear.highres import seam_ratio, upscale_cascade
from flexclear.images.files import read_settings
from flexclear.masks import Disc, Downsampled
from flexclear.runtime.hooks import entry_hook_of

PROMPT = "a red apple on a blue background"
FAST = {"steps": 2, "max_sequence_length": 16}
METHODS = ("sdedit", "imax")
PAIRS = pytest.mark.parametrize(("pipe", "method"), [("flux", "sdedit"), ("sd3", "imax")], indirect=["pipe"])


def pixels(picture):
    return np.asarray(picture).tobytes()


class Stop(Exception):
    """Raised in the middle of a stage."""


def stop_in(number, at=1):
    def on_step(stage, step, steps):
        if (stage.number, step) == (number, at):
            raise Stop

    return on_step


def state(pipe):
    """All that a cascade may change on a pipeline."""
    vae, model = pipe.vae, pipe.transformer
    return (
        id(pipe.scheduler),
        pipe.scheduler.config,
        dict(pipe.config),
        {name: id(processor) for name, processor in model.attn_processors.items()},
        id(entry_hook_of(model)),
        [type(hook) for module in model.modules() for hook in module._forward_pre_hooks.values()],
        [type(hook) for module in model.modules() for hook in module._forward_hooks.values()],
        (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor),
        pipe._progress_bar_config,
        list(model.state_dict()),
    )


@PAIRS
def test_same_seed_same_picture_and_another_seed_another(pipe, method):
    first, again, other = (
        upscale_cascade(pipe, PROMPT, [32, 48], method=method, seed=seed, **FAST) for seed in (3, 3, 4)
    )
    assert [pixels(p) for p in first.images] == [pixels(p) for p in again.images]
    assert pixels(first.image) != pixels(other.image)
    assert [stage.seed for stage in first.stages] == [3, 4]
    assert first.image is first.images[-1]
    assert (first.files, first.resumed) == ((), 0)


@pytest.mark.parametrize(
    ("pipe", "method", "number", "transformed"),
    [
        ("flux", "sdedit", 1, True),
        ("flux", "sdedit", 2, False),
        ("flux", "imax", 2, True),
        ("sd3", "imax", 2, False),
        ("sd3", "sdedit", 2, True),
    ],
    indirect=["pipe"],
)
def test_whatever_a_stage_changed_comes_back_after_an_error_and_after_success(pipe, method, transformed, number):
    if transformed:
        flexclear.transform(pipe, r=5, backend="sdpa", proportional_attention=True)
    before = state(pipe)
    call = {"method": method, "r": 2 if transformed else None, "tile": 32, **FAST}
    with pytest.raises(Stop):
        upscale_cascade(pipe, PROMPT, [32, 48], on_step=stop_in(number), **call)
    assert state(pipe) == before
    if number == 2:
        upscale_cascade(pipe, PROMPT, [32, 48], **call)
        assert state(pipe) == before


def test_trained_pooling_weights_outlive_stages_with_other_windows(flux, photo):
    flexclear.transform(flux, r=2, down_factor=2, backend="sdpa")
    with torch.no_grad():
        for name, weight in flux.transformer.named_parameters():
            if name.endswith("spatial_weight"):
                weight.copy_(torch.rand_like(weight))
    kept = {name: value.clone() for name, value in flux.transformer.state_dict().items()}
    done = upscale_cascade(flux, PROMPT, [72, 96], image=photo, r=[None, 3], **FAST)
    pooled = Downsampled(Disc(3), 2).name
    assert [set(stage.windows) for stage in done.stages] == [{"dense"}, {pooled}]
    assert all(torch.equal(kept[name], value) for name, value in flux.transformer.state_dict().items())
    flexclear.restore(flux)


def test_a_formula_stays_unless_windows_or_dense_layers_are_asked_for(flux, photo, tmp_path):
    call = {"sizes": [72], "image": photo, **FAST}
    drawn = {r: upscale_cascade(flux, PROMPT, r=r, **call) for r in (None, 3)}
    flexclear.transform(flux, attention="linear", backend="sdpa")
    before = state(flux)
    for r, expected in drawn.items():
        ours = upscale_cascade(flux, PROMPT, r=r, **call)
        assert ours.stages == expected.stages
        assert np.abs(np.asarray(ours.image).astype(int) - np.asarray(expected.image)).max() <= 1
    kept = upscale_cascade(flux, PROMPT, folder=tmp_path, **call)
    assert set(kept.stages[0].windows) == {"linear"}
    assert pixels(kept.image) != pixels(drawn[None].image)
    with pytest.raises(ValueError, match="holds a cascade with other settings"):
        upscale_cascade(flux, PROMPT, r=None, folder=tmp_path, **call)
    assert state(flux) == before
    flexclear.restore(flux)


def test_a_transparent_image_lies_on_white(flux):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (32, 0, 64, 64))
    white = Image.new("RGB", (64, 64), "white")
    white.paste((255, 0, 0), (0, 0, 32, 64))
    ours, expected = (upscale_cascade(flux, PROMPT, [72], image=image, **FAST) for image in (clear, white))
    assert ours.image.tobytes() == expected.image.tobytes()


@PAIRS
def test_an_interrupted_stage_resumes_from_the_last_finished_one(pipe, method, tmp_path):
    call = {"sizes": [16, 24, 32], "method": method, **FAST}
    whole = upscale_cascade(pipe, PROMPT, **call)
    with pytest.raises(Stop):
        upscale_cascade(pipe, PROMPT, **call, folder=tmp_path, on_step=stop_in(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cascade.json",
        "stage_1_16x16.png",
        "stage_2_24x24.png",
    ]
    seen = []
    resumed = upscale_cascade(
        pipe, PROMPT, **call, folder=tmp_path, on_step=lambda stage, *_: seen.append(stage.number)
    )
    assert set(seen) == {3}
    assert resumed.resumed == 2
    assert [pixels(p) for p in resumed.images] == [pixels(p) for p in whole.images]
    assert [pixels(Image.open(file)) for file in resumed.files] == [pixels(p) for p in whole.images]
    told = read_settings(resumed.files[1])["settings"]
    assert (told["prompt"], told["height"], told["seed"], told["method"]) == (PROMPT, 24, 1, method)
    again = upscale_cascade(pipe, PROMPT, **call, folder=tmp_path, on_step=stop_in(1))
    assert again.resumed == 3
    assert pixels(again.image) == pixels(whole.image)


def test_a_folder_goes_on_with_new_last_stages_and_redraws_what_was_removed(flux, tmp_path):
    first = upscale_cascade(flux, PROMPT, [32, 48], folder=tmp_path, **FAST)
    more = upscale_cascade(flux, PROMPT, [32, 48, 64], folder=tmp_path, shift=[None, None, 4.0], **FAST)
    assert more.resumed == 2
    first.files[1].unlink()
    seen = []
    again = upscale_cascade(
        flux, PROMPT, [32, 48], folder=tmp_path, on_step=lambda stage, *_: seen.append(stage.number), **FAST
    )
    assert set(seen) == {2}
    assert pixels(again.image) == pixels(first.image)
    assert len(json.loads((tmp_path / "cascade.json").read_text())["stages"]) == 2


def test_a_folder_of_other_settings_is_refused_by_name(flux, sd3, photo, tmp_path):
    upscale_cascade(flux, PROMPT, [32, 48], folder=tmp_path, **FAST)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    flexclear.transform(flux, r=3, backend="sdpa")
    refused = {
        "windows was": {},
        "prompt was .* is": {"prompt": "a rocket", "r": None},
        "stage 1: seed was 0, is 1": {"seed": 1, "r": None},
        'method was "sdedit", is "imax"': {"method": "imax", "r": None},
        "stage 2: shift was 3.0, is 2.0": {"shift": [None, 2.0], "r": None},
        "image was null": {"image": photo.resize((24, 24)), "r": None},
        "tile was 64, is 32": {"tile": 32, "r": None},
        "max_sequence_length was 16, is 20": {"max_sequence_length": 20, "r": None},
    }
    for message, change in refused.items():
        call = {"prompt": PROMPT, "sizes": [32, 48], "folder": tmp_path, "on_step": stop_in(1), **FAST, **change}
        with pytest.raises(ValueError, match=f"holds a cascade with other settings.*{message}"):
            upscale_cascade(flux, **call)
    bias = flux.transformer.proj_out.bias
    own = bias.detach().clone()
    with torch.no_grad():
        bias[0] += 1  # as if it had been trained further
    try:
        with pytest.raises(ValueError, match=r"holds a cascade with other settings.*weights was"):
            upscale_cascade(flux, PROMPT, [32, 48], folder=tmp_path, r=None, **FAST)
    finally:
        with torch.no_grad():
            bias.copy_(own)
    with pytest.raises(ValueError, match="transformer was"):
        upscale_cascade(sd3, PROMPT, [32, 48], folder=tmp_path, **FAST)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_whose_files_are_not_what_the_manifest_says_is_refused(flux, tmp_path):
    call = {"prompt": PROMPT, "sizes": [32], "on_step": stop_in(1), **FAST}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        upscale_cascade(flux, **call, folder=tmp_path / "file")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "stage_1_32x32.png").write_bytes(b"theirs")
    with pytest.raises(ValueError, match=r"stage_1_32x32.png exists, but no cascade.json says where it is from"):
        upscale_cascade(flux, **call, folder=foreign)
    mine = tmp_path / "mine"
    upscale_cascade(flux, PROMPT, [32], folder=mine, **FAST)
    manifest = (mine / "cascade.json").read_text()
    Image.new("RGB", (32, 32)).save(mine / "stage_1_32x32.png")
    with pytest.raises(ValueError, match="was changed since its stage was finished"):
        upscale_cascade(flux, **call, folder=mine)
    (mine / "cascade.json").write_text(manifest.replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="has format 99, but this version reads 1"):
        upscale_cascade(flux, **call, folder=mine)
    (mine / "cascade.json").write_text(manifest[:40])
    with pytest.raises(ValueError, match="is not a cascade's manifest"):
        upscale_cascade(flux, **call, folder=mine)


def test_a_manifest_is_written_whole_or_not_at_all(flux, tmp_path, monkeypatch):
    import os

    upscale_cascade(flux, PROMPT, [32], folder=tmp_path, **FAST)
    before = (tmp_path / "cascade.json").read_bytes()
    replace = os.replace

    def failing(source, target):
        if str(target).endswith("cascade.json"):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        upscale_cascade(flux, PROMPT, [32, 48], folder=tmp_path, **FAST)
    assert (tmp_path / "cascade.json").read_bytes() == before
    monkeypatch.undo()
    done = upscale_cascade(flux, PROMPT, [32, 48], folder=tmp_path, **FAST)
    assert done.resumed == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cascade.json",
        "stage_1_32x32.png",
        "stage_2_48x48.png",
    ]


def test_there_is_a_progress_bar_per_stage(flux, capsys):
    upscale_cascade(flux, PROMPT, [32, 48], progress=True, **FAST)
    shown = capsys.readouterr().err
    assert "1/2 32 x 32 base" in shown
    assert "2/2 48 x 48 sdedit" in shown
    upscale_cascade(flux, PROMPT, [32, 48], **FAST)
    assert capsys.readouterr().err == "", "as the pipeline is configured"


def test_steps_are_told_as_they_end(flux):
    told = []
    upscale_cascade(
        flux, PROMPT, [32, 48], steps=[2, 10], max_sequence_length=16,
        on_step=lambda stage, step, steps: told.append((stage.method, step, steps)),
    )  # fmt: skip
    assert told == [("base", 1, 2), ("base", 2, 2), *(("sdedit", step, 7) for step in range(1, 8))]


def test_released_settings_hold_where_nothing_else_is_said(flux, sd3):
    """Method, section 7."""
    shown = {}
    for method in METHODS:
        for pipe, kind in ((flux, "flux"), (sd3, "sd3")):
            with pytest.raises(Stop):
                upscale_cascade(
                    pipe, PROMPT, [32, 64], method=method, steps=[1, None], max_sequence_length=16,
                    on_step=lambda stage, *_, key=(method, kind): (
                        shown.setdefault((*key, stage.number), stage),
                        stop_in(2)(stage, 1, 1),
                    ),
                )  # fmt: skip

    def told(*key):
        stage = shown[key]
        return (
            stage.steps,
            stage.strength,
            stage.guidance,
            stage.shift,
            stage.ntk_factor,
            stage.proportional_attention,
        )

    assert told("sdedit", "flux", 1) == (1, None, 3.5, None, 1.0, False)
    assert told("sdedit", "flux", 2) == (20, 0.7, 7.5, 3.0, 10.0, True)
    assert told("imax", "flux", 1) == (1, None, 3.5, 3.0, 1.0, False)
    assert told("imax", "flux", 2) == (30, None, 7.0, 6.0, 10.0, True)
    assert told("sdedit", "sd3", 2) == (20, 0.7, 7.5, 3.0, 1.0, True)
    assert told("imax", "sd3", 1) == (1, None, 7.0, None, 1.0, False)
    assert told("imax", "sd3", 2) == (30, None, 7.0, 6.0, 1.0, True)
    assert shown["imax", "flux", 2].training_tokens == 64 + 16


BAD = {
    "two prompts": ({"prompt": ["a", "b"]}, TypeError, "prompt must be one text"),
    "a method": ({"method": "magic"}, ValueError, r"method must be one of \['sdedit', 'imax'\], got 'magic'"),
    "an image": ({"image": torch.zeros(3, 8, 8)}, TypeError, "image must be a PIL image, got a Tensor"),
    "a seed": ({"seed": 1.5}, TypeError, "seed must be a whole number"),
    "no size": ({"sizes": []}, ValueError, "one or more sizes"),
    "a bare size": ({"sizes": 64}, ValueError, "one or more sizes"),
    "a word for a size": ({"sizes": ["64"]}, TypeError, r"a number of pixels or \(height, width\), got '64'"),
    "no multiple": ({"sizes": [32, 60]}, ValueError, "size 60: sides must be multiples of 8 pixels; near it: 64 x 64"),
    "no multiple pair": ({"sizes": [(32, 33)]}, ValueError, "size 32 x 33: .* near it: 32 x 32"),
    "shrinking": (
        {"sizes": [64, 32]},
        ValueError,
        "must be larger than what it is enlarged from, got 32 x 32 after 64 x 64",
    ),
    "standing still": ({"sizes": [64, 64]}, ValueError, "must be larger"),
    "another shape": ({"sizes": [(32, 64), (96, 96)]}, ValueError, "another aspect ratio than 32 x 64"),
    "a wrong shape for the picture": (
        {"image": Image.new("RGB", (64, 32)), "sizes": [(64, 64)]},
        ValueError,
        "another aspect ratio than 32 x 64",
    ),
    "an image that is too large": (
        {"image": Image.new("RGB", (64, 64)), "sizes": [32]},
        ValueError,
        "got 32 x 32 after 64 x 64",
    ),
    "too few steps": ({"steps": 0}, ValueError, "steps must be 1 or more, got 0"),
    "half a step": ({"steps": 2.5}, TypeError, "steps must be a whole number"),
    "steps for other stages": ({"steps": [2, 2, 2]}, ValueError, "one entry per size: 2, got 3"),
    "no strength": ({"strength": 0.0}, ValueError, "strength is the share of the steps"),
    "too strong": ({"strength": 1.5}, ValueError, "above 0 and at most 1, got 1.5"),
    "a strength for the first": ({"strength": [0.5, 0.5]}, ValueError, "strength is for stages that enlarge"),
    "a strength for I-Max": ({"method": "imax", "strength": 0.5}, ValueError, "strength=0.5 is for SDEdit"),
    "a negative guidance": ({"guidance": -1}, ValueError, "guidance must be finite and not negative"),
    "a shift": ({"shift": "dynamic"}, TypeError, "shift must be a number or 'own', got 'dynamic'"),
    "no shift": ({"shift": 0}, ValueError, "shift must be above 0"),
    "a proportion": ({"proportional_attention": 2}, TypeError, "proportional_attention must be True or False"),
    "a radius": ({"r": 0}, ValueError, "radius"),
    "a radius by name": ({"r": "wide"}, ValueError, "'keep' for the current windows, got 'wide'"),
    "radii for other stages": ({"r": [1, 2, 3]}, ValueError, "r as a sequence needs one entry per size: 2, got 3"),
    "a native size": ({"native": 1}, ValueError, "native must be a side in pixels, 8 or more, got 1"),
    "a tile": ({"tile": 40}, ValueError, "tile must be a multiple of 16 pixels for this VAE, got 40; near it: 32"),
    "a text length": ({"max_sequence_length": 0}, ValueError, "max_sequence_length must be a whole number"),
    "a level": ({"method": "imax", "wavelet_level": 0}, ValueError, "wavelet_level must be 1 or more"),
    "half a level": ({"method": "imax", "wavelet_level": 1.5}, TypeError, "wavelet_level must be a whole number"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_named_before_any_work(pipe, monkeypatch, change, error, message):
    def work(*args, **kwargs):
        pytest.fail("work was begun")

    monkeypatch.setattr(type(pipe), "encode_prompt", work)
    monkeypatch.setattr(type(pipe.vae), "encode", work)
    before = state(pipe)
    with pytest.raises(error, match=message):
        upscale_cascade(pipe, **{"prompt": PROMPT, "sizes": [32, 48], **change})
    assert state(pipe) == before


def test_what_one_model_cannot_do_is_named_before_any_work(flux, sd3, embedded, monkeypatch):
    call = {"prompt": PROMPT, "sizes": [32, 48], "on_step": stop_in(1), **FAST}
    with pytest.raises(ValueError, match=r"ntk_factor=10: SD3Transformer2DModel has no rotary positions"):
        upscale_cascade(sd3, **call, ntk_factor=10)
    with pytest.raises(
        ValueError, match=r"200 x 200: the position embedding .* ends at 24 x 24 tokens, 192 x 192 pixels"
    ):
        upscale_cascade(sd3, **{**call, "sizes": [32, 200]})
    with pytest.raises(ValueError, match="ntk_factor must be positive and finite, got 0"):
        upscale_cascade(flux, **call, ntk_factor=0)
    with pytest.raises(ValueError, match=r"negative_prompt: this FLUX.1 is guidance-distilled"):
        upscale_cascade(flux, **call, negative_prompt="")
    with pytest.raises(ValueError, match=r"guidance=3: this FLUX.1 has no guidance input .* pass a negative_prompt"):
        upscale_cascade(embedded, **call, guidance=3)
    flexclear.transform(flux, r=5, backend="sdpa")
    with monkeypatch.context() as patch:
        patch.setattr(entry_hook_of(flux.transformer), "parallel", object())
        with pytest.raises(ValueError, match="r: this model shares each image among several ranks"):
            upscale_cascade(flux, **call, r=2)
    flexclear.transform(flux, attention="sigmoid", backend="sdpa")
    with pytest.raises(ValueError, match=r"proportional_attention: attention='sigmoid' has its own formula"):
        upscale_cascade(flux, **call, proportional_attention=True)
    assert not upscale_cascade(flux, PROMPT, [32, 48], **FAST).stages[1].proportional_attention
    from diffusers import FlowMatchHeunDiscreteScheduler, FluxInpaintPipeline

    with pytest.raises(TypeError, match=r"works on FluxPipeline, .* got a FluxInpaintPipeline"):
        upscale_cascade(FluxInpaintPipeline(**flux.components), **call)
    own = flux.scheduler
    monkeypatch.setattr(flux, "scheduler", FlowMatchHeunDiscreteScheduler())
    with pytest.raises(ValueError, match=r"needs a FlowMatchEulerDiscreteScheduler.* has a FlowMatchHeunDiscrete"):
        upscale_cascade(flux, **call)
    flux.scheduler = own


def test_seams_are_counted_where_they_are():
    smooth = torch.arange(64.0).expand(3, 64, 64) + torch.arange(64.0)[:, None]
    assert seam_ratio(smooth, 8) == pytest.approx(1)
    stepped = smooth + 5 * (torch.arange(64) // 8)
    assert seam_ratio(stepped, 8) == pytest.approx(3.5)
    assert 1 < seam_ratio(stepped, 16) < 3.5, "half of the steps are between its borders"
    assert seam_ratio(torch.ones(3, 32, 32), 8) == pytest.approx(1)
    for picture, period in ((torch.zeros(32, 32), 8), (torch.zeros(3, 8, 32), 8), (torch.zeros(3, 32, 32), 1)):
        with pytest.raises(ValueError, match="sides are longer than a period"):
            seam_ratio(picture, period)
