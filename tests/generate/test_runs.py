"""Interrupted runs, file names, compilation: what ``flexclear generate`` does besides drawing."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import flexclear
from flexclear import cli
from flexclear.generation.generate import GenerateSettings, check, load
from flexclear.images.files import png_bytes, read_settings, slug

from helpers.generate_calls import APPLE, FAST, FLOWER, pixels


def test_an_interrupted_run_keeps_what_is_finished_and_exits_with_130(tmp_path, monkeypatch):
    from diffusers import FluxPipeline

    stop = {"after": 3}
    original = FluxPipeline.__call__

    def interrupted(self, *args, callback_on_step_end, **kwargs):
        def step_end(*step):
            stop["after"] -= 1
            if stop["after"] < 0:
                raise KeyboardInterrupt
            return callback_on_step_end(*step)

        return original(self, *args, callback_on_step_end=step_end, **kwargs)

    interrupted.__signature__ = __import__("inspect").signature(original)
    monkeypatch.setattr(FluxPipeline, "__call__", interrupted)
    arguments = ("generate", "embedded", *FAST, "--prompt", APPLE, "--prompt", FLOWER, "--out", tmp_path / "out")
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 130
    assert "interrupted: 1 of 2 images are finished" in done.output
    [file] = (tmp_path / "out").iterdir()
    assert read_settings(file)["settings"]["prompt"] == APPLE
    assert pixels(file)[0] == (96, 64)


def test_file_names_are_made_of_any_prompt():
    assert slug("A red apple, on a BLUE background!") == "a-red-apple-on-a-blue-background"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("ein grüner Äpfel / 青い背景") == "ein-grüner-äpfel-青い背景"
    assert slug("?!") == "picture"
    assert len(slug("word " * 100)) <= 48
    assert 0 < len(slug("x" * 500)) <= 48


def test_a_picture_of_another_program_has_no_settings(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="flexclear generate did not write it"):
        read_settings(tmp_path / "plain.png")
    content = png_bytes(Image.new("RGB", (2, 2)), {"prompt": "p", "seed": 1}, {"torch": "2"})
    (tmp_path / "ours.png").write_bytes(content)
    assert read_settings(tmp_path / "ours.png") == {"settings": {"prompt": "p", "seed": 1}, "versions": {"torch": "2"}}


def test_a_name_that_another_process_takes_first_is_left_to_it(tmp_path, monkeypatch):
    from flexclear.images import files as picture_files

    target = picture_files.Target.of(tmp_path, 1, False)
    (tmp_path / "0001_p.png").write_bytes(b"theirs")
    seen = iter([[], picture_files.numbered(tmp_path)])
    monkeypatch.setattr(picture_files, "numbered", lambda folder: next(seen))
    assert target.write(1, "p", b"ours") == tmp_path / "0002_p.png"
    assert (tmp_path / "0001_p.png").read_bytes() == b"theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0001_p.png", "0002_p.png"]


def test_blocks_are_compiled_on_request(tmp_path):
    settings = {"model": "embedded", "prompts": (APPLE,), "out": tmp_path, "device": "cpu"}
    for asked in (True, False):
        wanted = GenerateSettings(**settings, compile=asked)
        pipe = load(wanted, check(wanted))
        blocks = flexclear.compile.repeated_blocks(pipe.transformer)
        assert [block._compiled_call_impl is not None for block in blocks] == [asked] * len(blocks)


def test_checking_chooses_device_type_and_recipe(tmp_path):
    setup = check(GenerateSettings(model="embedded", prompts=(APPLE,), out=tmp_path, device="cpu", recipe="best"))
    assert (setup.device, setup.dtype, setup.recipe) == (torch.device("cpu"), torch.float32, "weight_only")
