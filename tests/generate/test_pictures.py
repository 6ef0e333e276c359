"""``flexclear generate``: images, their settings, names and timing lines."""

from __future__ import annotations

import json
import os
from importlib.metadata import version

import pytest
import torch
from PIL import Image

import flexclear
from flexclear.compile import why_not_recipe
from flexclear.images.files import read_settings, slug

from helpers.generate_calls import APPLE, FAST, FLOWER, ON_CPU, pixels


def test_every_prompt_is_drawn_at_every_size_with_every_seed_and_told_on_one_line_each(generate, tmp_path):
    arguments = ("--prompt", APPLE, "--prompt", FLOWER, "--size", "64x64", "--seed", 1, "--seed", 7, "--r", 4)
    lines = generate(*arguments)
    expected = [(p, h, w, s) for p in (APPLE, FLOWER) for h, w in ((64, 96), (64, 64)) for s in (1, 7)]
    assert [(t["prompt"], t["height"], t["width"], t["seed"]) for t in lines] == expected
    assert len({pixels(line)[1] for line in lines}) == len(lines)
    for number, line in enumerate(lines, 1):
        assert line["path"] == str(tmp_path / "out" / f"{number:04d}_{slug(line['prompt'])}.png")
        assert pixels(line)[0] == (line["width"], line["height"])
        assert line["steps"] == 2
        assert len(line["step_seconds"]) == 1
        assert 0 < line["median_step_seconds"] == line["step_seconds"][0] < line["seconds"]
        assert line["seconds_per_step"] == pytest.approx(line["seconds"] / 2)
        assert line["peak_memory_bytes"] is None, "known on CUDA only"


def test_a_picture_carries_its_settings_for_programs_and_for_people(generate):
    [line] = generate("--prompt", "a red apple, ünder 面", "--r", 4, "--seed", 3, "--guidance", 2.5)
    told = read_settings(line["path"])
    expected = {
        "prompt": "a red apple, ünder 面",
        "height": 64,
        "width": 96,
        "seed": 3,
        "steps": 2,
        "guidance": 2.5,
        "model": "embedded",
        "pipeline": "FluxPipeline",
        "r": 4,
        "down_factor": None,
        "weights": None,
        "recipe": None,
        "text_len": 32,
        "dtype": "float32",
        "device": "cpu",
        "backend": "sdpa",
    }
    assert {name: told["settings"][name] for name in expected} == expected
    assert told["versions"]["flexclear"] == flexclear.__version__
    assert told["versions"]["torch"] == version("torch")
    with Image.open(line["path"]) as picture:
        first, second, third = picture.text["parameters"].splitlines()
    assert first == "a red apple, ünder 面"
    assert "height: 64, width: 96, seed: 3, steps: 2" in second
    assert "r: 4" in second
    assert "weights" not in second, "what was not asked for is left out"
    assert f"torch {version('torch')}" in third


def test_the_same_command_again_writes_the_same_bytes_under_the_next_numbers(generate, tmp_path):
    arguments = ("--prompt", APPLE, "--prompt", FLOWER, "--r", 4)
    first, again = generate(*arguments), generate(*arguments)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name[:5] for name in names] == ["0001_", "0002_", "0003_", "0004_"]
    for one, other in zip(first, again, strict=True):
        assert one["path"] != other["path"]
        with open(one["path"], "rb") as a, open(other["path"], "rb") as b:
            assert a.read() == b.read()
    [other_seed] = generate("--prompt", APPLE, "--r", 4, "--seed", 1)
    assert pixels(other_seed) != pixels(first[0])


def test_overwriting_is_numbered_from_one_and_replaces(generate, tmp_path):
    [first] = generate("--prompt", APPLE, "--r", 4)
    before = pixels(first)
    [again] = generate("--prompt", APPLE, "--r", "dense", "--overwrite")
    assert again["path"] == first["path"]
    assert pixels(again) != before
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_one_picture_may_have_a_file_of_its_own_that_is_not_replaced_unasked(generate, command, tmp_path):
    [line] = generate("--prompt", APPLE, "--r", 4, out="deep/er/apple.png")
    assert line["path"] == str(tmp_path / "deep" / "er" / "apple.png")
    before = pixels(line)
    status, _, error = command("generate", "embedded", "--prompt", APPLE, "--out", line["path"])
    assert (status, pixels(line)) == (2, before)
    assert "apple.png exists already; --overwrite replaces it" in error
    generate("--prompt", APPLE, "--r", 4, "--seed", 1, "--overwrite", out="deep/er/apple.png")
    assert pixels(line) != before
    assert os.stat(line["path"]).st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_window_changes_the_picture_and_dense_is_the_plain_pipeline(generate):
    [dense] = generate("--prompt", APPLE, "--r", "dense")
    [narrow] = generate("--prompt", APPLE, "--r", 4)
    [default] = generate("--prompt", APPLE)
    assert pixels(dense) != pixels(narrow)
    assert read_settings(dense["path"])["settings"]["window"] == "dense"
    assert read_settings(default["path"])["settings"]["r"] == 16
    pipe = flexclear.embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(
        APPLE,
        height=64,
        width=96,
        num_inference_steps=2,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert pixels(dense) == (plain.size, plain.tobytes())


def test_the_embedded_pipeline_has_defaults_of_its_own_and_names_unknown_words(command, tmp_path):
    status, output, error = command(*("generate", "embedded", "--prompt", "a zebra", *ON_CPU, "--out", tmp_path))
    assert status == 0, error
    assert "was not trained on: zebra" in error
    [file] = tmp_path.iterdir()
    assert output.startswith(f"{file}: 128 x 128, seed 0, 16 steps in ")
    assert read_settings(file)["settings"]["text_len"] == 64


def test_people_read_standard_error_where_programs_read_standard_output(command, tmp_path):
    arguments = ("generate", "embedded", *FAST, "--prompt", "a zebra", "--json", "--out", tmp_path)
    status, output, error = command(*arguments)
    assert status == 0, error
    assert len(output.splitlines()) == 1
    assert json.loads(output)["prompt"] == "a zebra"
    assert "was not trained on: zebra" in error
    assert "64 x 96, seed 0, 2 steps in " in error
    assert "images" in error, "the progress bar"


def test_a_folder_that_save_pretrained_wrote_draws_the_same(generate, saved):
    [ours] = generate("--prompt", APPLE, "--r", 4)
    [folder] = generate("--prompt", APPLE, "--r", 4, model=saved / "pipe")
    assert pixels(ours) == pixels(folder)
    assert read_settings(folder["path"])["settings"]["model"] == str(saved / "pipe")


def test_prompts_come_from_a_file_without_blank_lines_and_comments(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"# apples\n{APPLE}\n\n   \n  {FLOWER}  \n#{APPLE}\n", encoding="utf-8")
    lines = generate("--prompts", tmp_path / "prompts.txt", "--r", 4)
    assert [line["prompt"] for line in lines] == [APPLE, FLOWER]


def test_height_and_width_are_one_size(generate):
    options = ("--steps", 1, "--text-len", 32, *ON_CPU)
    [line] = generate("--prompt", APPLE, "--height", 72, "--width", 64, "--r", 4, options=options)
    assert pixels(line)[0] == (64, 72)
    assert (line["step_seconds"], line["median_step_seconds"]) == ([], None)


def test_weights_bring_their_window_unless_another_one_is_asked_for(generate, saved):
    weights = ("--weights", saved / "local.safetensors")
    [own] = generate("--prompt", APPLE, *weights)
    [same] = generate("--prompt", APPLE, *weights, "--r", 3)
    [other] = generate("--prompt", APPLE, *weights, "--r", 5)
    [without] = generate("--prompt", APPLE, "--r", 3)
    assert pixels(own) == pixels(same)
    assert len({pixels(line) for line in (own, other, without)}) == 3
    told = [read_settings(line["path"])["settings"] for line in (own, other)]
    assert [one["r"] for one in told] == [3, 5]
    assert {one["backend"] for one in told} == {"sdpa"}
    assert told[0]["weights"] == str(saved / "local.safetensors")


def test_weights_may_be_named_inside_a_folder(generate, saved):
    [line] = generate("--prompt", APPLE, "--weights", f"{saved}:local.safetensors")
    assert read_settings(line["path"])["settings"]["r"] == 3


def test_pooled_keys_are_an_option(generate):
    [line] = generate("--prompt", APPLE, "--r", 3, "--down-factor", 4)
    told = read_settings(line["path"])["settings"]
    assert (told["r"], told["down_factor"]) == (3, 4)


def test_quantized_pictures_say_their_recipe_and_resemble_the_others(generate):
    [plain] = generate("--prompt", APPLE, "--r", 4)
    name = "int8" if why_not_recipe("int8", torch.device("cpu")) is None else "weight_only"
    [named] = generate("--prompt", APPLE, "--r", 4, "--recipe", name, "--min-features", 128)
    [fp8] = generate("--prompt", APPLE, "--r", 4, "--fp8", "--min-features", 128)
    settings = [read_settings(line["path"])["settings"] for line in (plain, named, fp8)]
    assert [one["recipe"] for one in settings[:2]] == [None, name]
    assert settings[2]["recipe"] == "weight_only", "the only FP8 recipe of a CPU"
    values = [torch.frombuffer(bytearray(pixels(line)[1]), dtype=torch.uint8).float() for line in (plain, named, fp8)]
    for quantized in values[1:]:
        assert 0 < (quantized - values[0]).abs().mean() < 8
