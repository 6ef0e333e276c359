"""``flexclear generate --config``: options from a YAML file, and those of an image that was drawn."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from flexclear.commands.generate import generate as command_of
from flexclear.common.reading import parse_yaml
from flexclear.generation.given_back import FOUND, SAME, options_of
from flexclear.images.files import read_settings

from helpers.generate_calls import APPLE, FAST, FLOWER, ON_CPU, pixels

FILE = f"""
model: embedded
prompt: [{APPLE}, {FLOWER}]
size: 64x96
steps: 2
text-len: 32
r: 4
guidance: 3
seed: 7
device: cpu
backend: sdpa
"""


@pytest.fixture
def config(tmp_path):
    """Writes a file of options."""

    def write(text, name="options.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def test_a_file_holds_what_the_command_line_holds(command, config, generate, tmp_path):
    status, _, error = command("generate", "--config", config(FILE), "--out", tmp_path / "file")
    assert status == 0, error
    lines = generate("--prompt", APPLE, "--prompt", FLOWER, "--r", 4, "--seed", 7, "--guidance", 3)
    for line in lines:
        assert Path(line["path"]).read_bytes() == (tmp_path / "file" / Path(line["path"]).name).read_bytes()


def test_the_command_line_takes_precedence(command, config, tmp_path):
    line = ("--prompt", APPLE, "--height", 64, "--width", 64, "--seed", 1, "--r", "dense")
    given = config(FILE + "weights: embedded:clear_local_8.safetensors\nframe-radius: 3\n")
    status, _, error = command("generate", "--config", given, *line, "--out", tmp_path / "a.png")
    assert status == 0, error
    told = read_settings(tmp_path / "a.png")["settings"]
    expected = {"prompt": APPLE, "height": 64, "width": 64, "seed": 1, "r": "dense", "weights": None, "guidance": 3.0}
    assert {name: told[name] for name in expected} == expected


def test_an_image_gives_back_the_options_that_draw_it_again_bit_for_bit(generate, command, tmp_path):
    first = generate("--prompt", APPLE, "--r", 4, "--seed", 3, out="first.png")[0]["path"]
    options = (
        "--prompt",
        FLOWER,
        "--image",
        first,
        "--strength",
        0.7,
        "--weights",
        "embedded:clear_local_8.safetensors",
    )
    more = ("--negative-prompt", "a 'red' apple: no", "--true-cfg-scale", 2.5, "--vae-tiling")
    highres = ("--highres", "64,96x128", "--highres-method", "imax", "--steps", 2, "--text-len", 32, *ON_CPU)
    files = {
        "plain": first,
        "from an image": generate(*options, *more, out="second.png")[0]["path"],
        "in stages": generate("--prompt", APPLE, "--r", 4, out="third.png", options=highres)[0]["path"],
    }
    for name, path in files.items():
        status, _, error = command("generate", "--config", path, "--out", tmp_path / "again.png", "--overwrite")
        assert status == 0, error
        assert "otherwise" not in error
        assert (tmp_path / "again.png").read_bytes() == Path(path).read_bytes(), name
        status, printed, error = command("settings", path)
        assert (status, error) == (0, "")
        (tmp_path / "printed.yaml").write_text(printed, encoding="utf-8")
        status, _, _ = command(
            "generate", "--config", tmp_path / "printed.yaml", "--out", tmp_path / "more.png", "--overwrite"
        )
        assert (tmp_path / "more.png").read_bytes() == Path(path).read_bytes(), name
    status, _, _ = command("generate", "--config", first, "--seed", 4, "--out", tmp_path / "other.png")
    assert (status, read_settings(tmp_path / "other.png")["settings"]["seed"]) == (0, 4)
    assert pixels(tmp_path / "other.png") != pixels(first)


def test_files_that_have_changed_since_are_told(generate, command, saved, tmp_path):
    import shutil

    weights = tmp_path / "local.safetensors"
    shutil.copy(saved / "local.safetensors", weights)
    [line] = generate("--prompt", APPLE, "--weights", weights)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    status, _, error = command("generate", "--config", line["path"], "--out", tmp_path / "again.png")
    assert status == 0
    assert "the image may come out differently: " in error
    assert "was drawn with other contents of these files" in error
    status, _, error = command("generate", "--config", line["path"], "--weights", weights, "--out", tmp_path / "b.png")
    assert "otherwise" not in error, "asked for"


BAD = {
    "no file": (None, "--config: no file "),
    "no YAML": ("a: [", "it is not valid YAML"),
    "a list": ("- steps", "must hold options and their values, such as 'steps: 20'; it holds ['steps']"),
    "an unknown key": ("stps: 3", "there is no option 'stps'; meant steps?"),
    "a number for a key": ("3: 3", "there is no option 3"),
    "another config": ("config: a.yaml", "there is no option 'config'"),
    "twice": ("text-len: 3\ntext_len: 3", "text_len is given twice, with a hyphen and with an underscore"),
    "a text for a number": ("steps: many", "steps must be a whole number, got 'many'"),
    "a fraction": ("steps: 2.5", "steps must be a whole number, got 2.5"),
    "true for a number": ("steps: true", "steps must be a whole number, got True"),
    "nothing": ("steps:", "steps must be a whole number, got None"),
    "too few": ("steps: 0", "steps must be 1 or more, got 0"),
    "too many": (f"seed: {2**64}", f"seed must be from 0 to {2**64 - 1}, got"),
    "one of several": ("seed: [1, -1]", "seed must be from 0 to"),
    "an empty list": ("prompt: []", "prompt is an empty list; leave it out"),
    "a list for one": ("steps: [1]", "steps must be a whole number, got [1]"),
    "nan": ("guidance: .nan", "guidance must be a finite number, got nan"),
    "a number for a flag": ("compile: 1", "compile must be true or false, got 1"),
    "a mapping for a text": ("weights: {a: 1}", "weights must be a text or a whole number, got {'a': 1}"),
    "a number for a path": ("out: 3", "out must be a path, got 3"),
    "what the command refuses": ("dtype: float8", "--dtype must be one of"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_a_file_that_does_not_fit_is_one_line(command, config, tmp_path, text, message):
    file = tmp_path / "nowhere.yaml" if text is None else config(text)
    status, output, error = command(
        "generate", "embedded", "--prompt", APPLE, "--config", file, "--out", tmp_path / "out"
    )
    assert (status, output) == (2, "")
    assert message in error
    assert error.startswith("flexclear: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_images_of_other_programs_give_nothing_back(command, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    for arguments in (("generate", "--config", tmp_path / "other.png"), ("settings", tmp_path / "other.png")):
        status, _, error = command(*arguments)
        assert status == 2
        assert "flexclear generate did not write it" in error
    with pytest.raises(ValueError, match="carries a setting that this version does not know: colour"):
        options_of({"prompt": "a", "seed": 1, "height": 8, "width": 8, "colour": "red"}, "a.png")
    with pytest.raises(ValueError, match="carries no settings of an image"):
        options_of({"prompt": "a"}, "a.png")


def test_every_setting_that_an_image_carries_is_an_option(generate):
    names = set(inspect.signature(command_of).parameters)
    assert set(SAME) <= names
    assert {"prompt", "seed", "size", "highres", "highres_method", "shift", "parallel_text", "exchange"} <= names
    [line] = generate("--prompt", APPLE, "--r", 4)
    told = set(read_settings(line["path"])["settings"])
    assert told - {*SAME, *FOUND} == {"prompt", "height", "width", "seed"}
    drawing = names - {"out", "overwrite", "resume", "json", "prompts", "height", "width", "fp8", "memory", "stages"}
    drawing -= {"ray", "ray_actors"}
    given_elsewhere = {
        "prompt",
        "size",
        "seed",
        "highres",
        "highres_method",
        "shift",
        "parallel",
        "parallel_text",
        "exchange",
    }
    assert drawing - given_elsewhere - {"context", "config"} == set(SAME), "what changes an image is told by it"


def test_printed_settings_are_yaml_of_options(generate, command):
    [line] = generate("--prompt", "a 'red' apple: # no", "--r", 4, "--seed", 3)
    status, printed, _ = command("settings", line["path"])
    assert status == 0
    torch_version = re.escape(version("torch"))
    assert re.match(rf"# {re.escape(line['path'])}: flexclear \S+, .*torch {torch_version}", printed)
    told = parse_yaml(printed)
    assert (told["prompt"], told["size"], told["text-len"], told["r"]) == ("a 'red' apple: # no", "64x96", 32, 4)
    assert FAST


def test_the_page_s_file_holds_options(command, config, monkeypatch):
    from helpers.documents import DOCS, blocks

    [block] = blocks(DOCS / "guide" / "command-line.md", "yaml")
    asked = []

    def check(settings):
        asked.append(settings)
        raise ValueError("that is all")

    monkeypatch.setattr("flexclear.generation.settings.GenerateSettings.check", check)
    status, _, error = command("generate", "--config", config(block.code))
    assert (status, error) == (2, "flexclear: that is all\n")
    assert (asked[0].seeds, asked[0].recipe, asked[0].offload) == ((1, 2, 3), "best", "model")
