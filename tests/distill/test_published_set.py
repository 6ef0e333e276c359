"""The published set's layout, ``NAME.jpg`` beside ``NAME.json`` with ``"prompt"``: to be cached, and to train on."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from flexclear import cli
from flexclear.distill import CachedSamples, DistillConfig, OptimizerConfig, distill
from flexclear.distill.config import HeldOutConfig
from flexclear.distill.sources import find_items


@pytest.fixture
def published(tmp_path):
    """Three images as the published set's archive unpacks to."""
    folder = tmp_path / "data_1024_10K"
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"data_{number:06d}.jpg")
        record = {"prompt": f" a {colour} square\n", "seed": number}
        (folder / f"data_{number:06d}.json").write_text(json.dumps(record))
    return folder


def test_the_published_set_s_layout_is_read(published):
    items, skipped = find_items(published)
    assert [(item.name, item.caption) for item in items] == [
        ("data_000000.jpg", "a red square"),
        ("data_000001.jpg", "a green square"),
        ("data_000002.jpg", "a blue square"),
    ]
    assert skipped == []
    assert items[0].picture().size == (64, 64)


def test_bad_json_a_missing_prompt_and_a_missing_image_are_named(published):
    (published / "data_000000.json").write_text('{"prompt": ')
    (published / "data_000001.json").write_text('{"negative_prompt": "a dog"}')
    (published / "data_000002.jpg").unlink()
    (published / "lost.json").write_text("{")
    (published / "settings.json").write_text('{"steps": 20}')  # of something else
    Image.new("RGB", (64, 64)).save(published / "alone.jpg")
    Image.new("RGB", (64, 64)).save(published / "text_first.jpg")
    (published / "text_first.txt").write_text("a caption")
    (published / "text_first.json").write_text('{"prompt": "another"}')
    items, skipped = find_items(published)
    assert [(item.name, item.caption) for item in items] == [("text_first.jpg", "a caption")]
    told = {lost.name: lost.reason for lost in skipped}
    assert list(told) == ["alone.jpg", "data_000000.jpg", "data_000001.jpg", "data_000002.json", "lost.json"]
    assert "neither alone.txt nor alone.json beside it, nor a line of metadata.jsonl" in told["alone.jpg"]
    assert told["data_000000.jpg"].startswith("caption cannot be read: data_000000.json: ")
    assert told["data_000001.jpg"] == "caption cannot be read: data_000001.json: no text or caption or prompt"
    assert told["data_000002.json"].startswith("no image beside it: data_000002 with .png, .jpg")
    assert "and it cannot be read" in told["lost.json"]


def settings(folder, output, **changed):
    chosen = {
        "model": "embedded",
        "data": folder,
        "output": output,
        "r": 2,
        "backend": "sdpa",
        "steps": 1,
        "gradient_accumulation": 1,
        "device": "cpu",
        "optimizer": OptimizerConfig("adamw"),
        "held_out": HeldOutConfig(1),
    }
    return DistillConfig(**{**chosen, **changed})


def test_a_run_encodes_the_published_set_first_and_only_once(published, tmp_path):
    told = []
    done = distill(config=settings(published, tmp_path / "run"), say=told.append)
    assert done.steps == 1
    assert told[0] == f"encoding the images of {published} into {tmp_path / 'run' / 'cache'}"
    samples = CachedSamples(tmp_path / "run" / "cache")
    assert sorted(sample.caption for sample in samples) == ["a blue square", "a green square", "a red square"]
    assert samples[0].prompt_embeds.shape[0] == 64, "the embedded model's text length"
    [shard] = (tmp_path / "run" / "cache").glob("*.safetensors")
    stamp = shard.stat().st_mtime_ns
    assert distill(config=settings(published, tmp_path / "run", steps=2)).steps == 2
    assert shard.stat().st_mtime_ns == stamp


def test_pictures_that_cannot_be_encoded_in_the_run_are_refused(published, tmp_path, monkeypatch):
    from helpers.models import tiny_flux

    with pytest.raises(
        ValueError, match=r"no model is named to encode them\. Run flexclear data cache .*; then set data: CACHE"
    ):
        distill(tiny_flux(num_single_layers=3), settings(published, tmp_path / "run", model=None))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match=r"each of 4 processes would encode\. Run flexclear data cache .* --model embedded"
    ):
        distill(config=settings(published, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_command_caches_the_published_set(published, tmp_path, capsys):
    command = [
        "data",
        "cache",
        str(published),
        "--model",
        "embedded",
        "--out",
        str(tmp_path / "cache"),
        "--text-len",
        "16",
    ]
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--device", "cpu"])
    assert not end.value.code
    assert "3 samples, 0 skipped" in capsys.readouterr().out
