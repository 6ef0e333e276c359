"""Folders of images and the settings that all of them were drawn with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from flexclear.common.fingerprints import fingerprint_pipeline
from flexclear.embedded import model_directory
from flexclear.generation.generate import GenerateSettings, check
from flexclear.images import folder_settings
from flexclear.images.folder_settings import keep_settings

TOLD = {"model": "m", "base": {"steps": 4, "sizes": ((64, 64),), "out": Path("x")}}


def test_other_settings_are_named_and_nothing_is_changed(tmp_path):
    folder = tmp_path / "new"
    keep_settings(folder, TOLD, "Name another.")
    keep_settings(folder, TOLD, "Name another.")
    before = (folder / "settings.json").read_bytes()
    assert json.loads(before) == {"model": "m", "base": {"steps": 4, "sizes": [[64, 64]], "out": "x"}}
    for changed, told in (
        ({**TOLD, "model": "n"}, 'model was "m", is "n"'),
        ({**TOLD, "base": {**TOLD["base"], "steps": 5}}, "base.steps was 4, is 5"),
        ({**TOLD, "more": [1]}, r"more was null, is \[1\]"),
    ):
        with pytest.raises(ValueError, match=rf"new holds images with other settings \({told}\)\. Name another\."):
            keep_settings(folder, changed, "Name another.")
    assert (folder / "settings.json").read_bytes() == before


def test_images_of_unknown_settings_are_refused(tmp_path):
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds images, but no settings\.json"):
        keep_settings(tmp_path, TOLD, "Name another.")
    assert [place.name for place in tmp_path.iterdir()] == ["0.png"]


def test_of_two_processes_that_begin_together_the_second_compares(tmp_path, monkeypatch):
    def first(path, overwrite):
        (tmp_path / "settings.json").write_text(json.dumps({"model": "theirs"}))
        return whole_file(path, overwrite)

    whole_file = folder_settings.whole_file
    monkeypatch.setattr(folder_settings, "whole_file", first)
    with pytest.raises(ValueError, match='model was "theirs", is "m"'):
        keep_settings(tmp_path, TOLD, "Name another.")
    (tmp_path / "settings.json").unlink()
    keep_settings(tmp_path, {"model": "theirs"}, "Name another.")


def test_a_model_that_was_replaced_under_its_name_is_another(tmp_path):
    model = shutil.copytree(model_directory(), tmp_path / "model", copy_function=os.link)
    settings = GenerateSettings(model=str(model), prompts=("p",), out=tmp_path / "out", device="cpu", r="dense")
    before = check(settings).fingerprints
    (model / "README.md").write_text("about it")
    (model / "images").mkdir()
    (model / "images" / "0.png").write_bytes(b"drawn")
    assert check(settings).fingerprints == before
    weights = next((model / "transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    assert check(settings).fingerprints != before
    (model / "model_index.json").unlink()
    (model / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model_index\.json is damaged"):
        fingerprint_pipeline(model)
