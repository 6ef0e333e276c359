"""What ``flexclear generate`` refuses before anything is loaded."""

from __future__ import annotations

import json

import pytest
import torch

from flexclear.common.choices import parse_size
from flexclear.generation.parsing import parse_radius, read_prompts
from flexclear.generation.settings import GenerateSettings

from helpers.generate_calls import APPLE, FAST, FLOWER


def test_quantizing_what_is_too_small_says_which_option_lowers_the_limit(command, tmp_path):
    arguments = ("generate", "embedded", *FAST, "--prompt", APPLE, "--recipe", "weight_only", "--out", tmp_path)
    status, _, error = command(*arguments)
    assert status == 2
    assert "has no linear to quantize" in error
    assert "--min-features (now 256)" in error
    assert "Traceback" not in error


BAD = {
    "no prompt": ((), "no prompt: give --prompt TEXT"),
    "an empty prompt": (("--prompt", " "), "a prompt is needed for every image"),
    "two kinds of prompts": (("--prompt", APPLE, "--prompts", "x.txt"), "--prompt or --prompts, not both"),
    "no prompt file": (("--prompts", "nowhere.txt"), "--prompts: no file nowhere.txt"),
    "no size": (("--prompt", APPLE, "--size", "64"), "a size is HEIGHTxWIDTH in pixels, such as 1024x768; got '64'"),
    "size 0": (("--prompt", APPLE, "--size", "0x64"), "a size is HEIGHTxWIDTH in pixels"),
    "a size that is no multiple": (
        ("--prompt", APPLE, "--size", "64x100"),
        "FluxPipeline draws sizes that are multiples of 8 pixels, got 64x100; near it: 64x96",
    ),
    "height alone": (("--prompt", APPLE, "--height", 64), "--height and --width go together"),
    "two kinds of sizes": (
        ("--prompt", APPLE, "--size", "64x64", "--height", 64, "--width", 64),
        "give --size or --height and --width, not both; got --size 64x64",
    ),
    "radius 0": (("--prompt", APPLE, "--r", 0), "--r is a window radius of 1 or more tokens, or 'dense'"),
    "radius wide": (("--prompt", APPLE, "--r", "wide"), "got 'wide'"),
    "dense with weights": (("--prompt", APPLE, "--r", "dense", "--weights", "a.safetensors"), "leave one out"),
    "dense with cells": (("--prompt", APPLE, "--r", "dense", "--down-factor", 4), "--down-factor 4 is for windowed"),
    "cells without radius": (
        ("--prompt", APPLE, "--weights", "a.safetensors", "--down-factor", 4),
        "give --r as well",
    ),
    "no weights": (("--prompt", APPLE, "--weights", "a.safetensors"), "--weights a.safetensors: no file"),
    "an unknown recipe": (("--prompt", APPLE, "--recipe", "int3"), "recipe must be one of ['rowwise'"),
    "the best recipe by name": (("--prompt", APPLE, "--recipe", "best"), "--fp8 chooses the best"),
    "two kinds of recipe": (("--prompt", APPLE, "--recipe", "int8", "--fp8"), "give --fp8 or --recipe, not both"),
    "a type for another recipe": (
        ("--prompt", APPLE, "--recipe", "rowwise", "--dtype", "float32", "--device", "cpu"),
        "--recipe 'rowwise' cannot run here: FP8 products need a CUDA device; this is 'cpu'",
    ),
    "an unknown type": (("--prompt", APPLE, "--dtype", "float8"), "--dtype must be one of ['auto', 'float32'"),
    "an unknown device": (("--prompt", APPLE, "--device", "toaster"), "--device 'toaster' cannot be used"),
    "a device without numbers": (("--prompt", APPLE, "--device", "meta"), "--device 'meta' holds no numbers"),
    "an unknown backend": (("--prompt", APPLE, "--backend", "magic"), "--backend must be one of"),
    "a folder for a jpeg": (("--prompt", APPLE, "--out", "x.jpg"), "--out must end in .png"),
    "one file for two": (("--prompt", APPLE, "--prompt", FLOWER, "--out", "x.png"), "one file, x.png, for 2 images"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_named_before_anything_is_loaded(command, tmp_path, monkeypatch, arguments, message):
    def load(*args, **kwargs):
        pytest.fail("weights were read")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", load)
    status, output, error = command("generate", "embedded", *arguments)
    assert (status, output) == (2, "")
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == [], "no folder is made for a command that cannot run"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("empty", "empty is no pipeline folder: it has no model_index.json"),
        ("notes.txt", "notes.txt is a file"),
        ("./nowhere", "no folder ./nowhere, and it is no hub id"),
        ("unet", "has no transformer, which flexclear cannot transform; --r dense draws with the plain model"),
        ("dit", "has a DiTTransformer2DModel, which flexclear cannot transform"),
    ],
)
def test_what_is_no_model_is_named_before_anything_is_loaded(command, tmp_path, monkeypatch, model, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    for folder, parts in (
        ("unet", {"unet": ["diffusers", "UNet2DConditionModel"]}),
        ("dit", {"transformer": ["diffusers", "DiTTransformer2DModel"]}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **parts}))
    status, _, error = command("generate", model, "--prompt", APPLE)
    assert status == 2
    assert message in error
    assert "Traceback" not in error


def test_weights_that_are_a_folder_or_a_pickle_are_refused(command, saved, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    for weights, message in ((saved, f"(here: {saved}:FILE)"), (tmp_path / "a.safetensors", "is a pickle")):
        status, _, error = command("generate", "embedded", "--prompt", APPLE, "--weights", weights)
        assert status == 2
        assert message in error
        assert "Traceback" not in error


@pytest.mark.parametrize("out", ["notes.txt/pictures", "/proc/pictures"])
def test_a_place_that_cannot_be_written_is_named(command, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("notes")
    status, _, error = command("generate", "embedded", "--prompt", APPLE, "--out", out)
    assert status == 2
    assert f"--out {out} cannot be written: " in error
    assert "Traceback" not in error


def test_prompt_files_that_hold_none_are_refused(tmp_path):
    (tmp_path / "comments.txt").write_text("# a\n\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "comments.txt")
    with pytest.raises(ValueError, match="must be a UTF-8 text file"):
        read_prompts(tmp_path / "bytes.txt")
    with pytest.raises(ValueError, match="is a folder"):
        read_prompts(tmp_path)


def test_sizes_and_radii_are_read_as_they_are_written():
    assert parse_size("1024x768") == parse_size(" 1024 X 768 ") == (1024, 768)
    assert (parse_radius("16"), parse_radius("dense")) == (16, "dense")
    for text in ("1024", "x", "-8x8", "8x8x8", "8.5x8"):
        with pytest.raises(ValueError, match="a size is HEIGHTxWIDTH"):
            parse_size(text)


def test_an_option_that_the_pipeline_lacks_is_named(tmp_path):
    import diffusers

    from flexclear.generation.calls import call_arguments

    settings = GenerateSettings(model="embedded", prompts=(APPLE,), out=tmp_path, text_len=32, guidance=3.0)
    with pytest.raises(ValueError, match="FluxPipeline has no max_sequence_length"):
        call_arguments(diffusers.FluxPipeline, settings, {"num_inference_steps": 50, "guidance_scale": 1.0})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("FluxPipeline", {"guidance_scale": 3.0}),
        ("StableDiffusion3Pipeline", {"guidance_scale": 3.0}),
        ("ChromaPipeline", {"guidance_scale": 3.0}),
        ("Flux2Pipeline", {"guidance_scale": 3.0}),
        ("ZImagePipeline", {"guidance_scale": 3.0}),
        ("QwenImagePipeline", {"true_cfg_scale": 3.0, "negative_prompt": " "}),
    ],
)
def test_every_family_s_pipeline_takes_the_arguments(kind, expected, tmp_path):
    import inspect

    import diffusers

    from flexclear.generation.calls import call_arguments

    pipeline = getattr(diffusers, kind)
    parameters = inspect.signature(pipeline.__call__).parameters
    assert {"prompt", "height", "width", "generator", "callback_on_step_end"} <= set(parameters)
    settings = GenerateSettings(model="embedded", prompts=(APPLE,), out=tmp_path, steps=4, text_len=32, guidance=3.0)
    given = call_arguments(pipeline, settings)
    assert given == {"num_inference_steps": 4, "max_sequence_length": 32, **expected}
    inspect.signature(pipeline.__call__).bind(None, prompt=APPLE, **given)


def test_sizes_are_checked_by_the_rule_of_each_family_s_pipeline(tmp_path):
    import diffusers

    from flexclear.generation.check import check_sizes, skeleton_of

    for kind, vae_kind in (
        ("FluxPipeline", "AutoencoderKL"),
        ("StableDiffusion3Pipeline", "AutoencoderKL"),
        ("ChromaPipeline", "AutoencoderKL"),
        ("ZImagePipeline", "AutoencoderKL"),
        ("Flux2Pipeline", "AutoencoderKLFlux2"),
        ("QwenImagePipeline", "AutoencoderKLQwenImage"),
    ):
        with torch.device("meta"):
            extra = {"down_block_types": ["DownEncoderBlock2D"] * 4, "block_out_channels": [32] * 4}
            extra["up_block_types"] = ["UpDecoderBlock2D"] * 4
            vae = getattr(diffusers, vae_kind)(**(extra if vae_kind == "AutoencoderKL" else {}))
        folder = tmp_path / kind
        vae.save_config(folder / "vae")
        pipe = skeleton_of(str(folder), {"_class_name": kind, "vae": ["diffusers", vae_kind]})
        assert type(pipe).__name__ == kind
        settings = GenerateSettings(model="x", prompts=(APPLE,), out=tmp_path, sizes=((1024, 1040),))
        check_sizes(pipe, settings)
        settings = GenerateSettings(model="x", prompts=(APPLE,), out=tmp_path, sizes=((1024, 1032),))
        with pytest.raises(ValueError, match=f"{kind} draws sizes that are multiples of 16 pixels, got 1024x1032"):
            check_sizes(pipe, settings)
