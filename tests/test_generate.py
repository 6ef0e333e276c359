"""``flexclear generate``: pictures, their settings, names, timing lines, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import os

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import flexclear
from flexclear import cli
from flexclear.generate import GenerateSettings, check, load, parse_radius, parse_size, read_prompts
from flexclear.picture_files import png_bytes, read_settings, slug

APPLE = "a red apple on a blue background"
FLOWER = "a sunflower on a white background"
ON_CPU = ("--device", "cpu", "--backend", "sdpa")
FAST = ("--steps", 2, "--text-len", 32, "--size", "64x96", *ON_CPU)


@pytest.fixture
def command(capsys):
    """Runs the command line in this process: exit status, standard output, standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def generate(command, tmp_path):
    """Draws into a folder, and gives the timing lines."""

    def run(*arguments, model="embedded", out="out", options=FAST):
        status, output, error = command("generate", model, *options, "--json", "--out", tmp_path / out, *arguments)
        assert status == 0, error
        return [json.loads(line) for line in output.splitlines()]

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The embedded pipeline as save_pretrained writes it, and a weights file of it for r = 3."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = flexclear.embedded.pipeline()
    pipe.save_pretrained(folder / "pipe")
    flexclear.transform(pipe, r=3)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if name.endswith("attn.to_v.weight"):
                parameter.mul_(0.5)
    flexclear.save_weights(pipe, folder / "local.safetensors")
    return folder


def pixels(line_or_path):
    path = line_or_path["path"] if isinstance(line_or_path, dict) else line_or_path
    with Image.open(path) as picture:
        return picture.size, picture.convert("RGB").tobytes()


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
    assert told["versions"]["torch"] == str(torch.__version__)
    with Image.open(line["path"]) as picture:
        first, second, third = picture.text["parameters"].splitlines()
    assert first == "a red apple, ünder 面"
    assert "height: 64, width: 96, seed: 3, steps: 2" in second
    assert "r: 4" in second
    assert "weights" not in second, "what was not asked for is left out"
    assert f"torch {torch.__version__}" in third


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
    assert "pictures" in error, "the progress bar"


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


def test_quantised_pictures_say_their_recipe_and_resemble_the_others(generate):
    [plain] = generate("--prompt", APPLE, "--r", 4)
    [int8] = generate("--prompt", APPLE, "--r", 4, "--recipe", "int8", "--min-features", 128)
    [fp8] = generate("--prompt", APPLE, "--r", 4, "--fp8", "--min-features", 128)
    settings = [read_settings(line["path"])["settings"] for line in (plain, int8, fp8)]
    assert [one["recipe"] for one in settings[:2]] == [None, "int8"]
    assert settings[2]["recipe"] == "weight_only", "the only FP8 recipe of a CPU"
    values = [torch.frombuffer(bytearray(pixels(line)[1]), dtype=torch.uint8).float() for line in (plain, int8, fp8)]
    for quantised in values[1:]:
        assert 0 < (quantised - values[0]).abs().mean() < 8


def test_quantising_what_is_too_small_says_which_option_lowers_the_limit(command, tmp_path):
    arguments = ("generate", "embedded", *FAST, "--prompt", APPLE, "--recipe", "int8", "--out", tmp_path)
    status, _, error = command(*arguments)
    assert status == 2
    assert "has no linear to quantise" in error
    assert "--min-features (now 256)" in error
    assert "Traceback" not in error


BAD = {
    "no prompt": ((), "no prompt: give --prompt TEXT"),
    "an empty prompt": (("--prompt", " "), "a prompt is needed for every picture"),
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
        "--recipe 'rowwise' cannot run here: FP8 products need a CUDA device, this is 'cpu'",
    ),
    "an unknown type": (("--prompt", APPLE, "--dtype", "float8"), "--dtype must be one of ['auto', 'float32'"),
    "an unknown device": (("--prompt", APPLE, "--device", "toaster"), "--device 'toaster' cannot be used"),
    "a device without numbers": (("--prompt", APPLE, "--device", "meta"), "--device 'meta' holds no numbers"),
    "an unknown backend": (("--prompt", APPLE, "--backend", "magic"), "--backend must be one of"),
    "a folder for a jpeg": (("--prompt", APPLE, "--out", "x.jpg"), "--out must end in .png"),
    "one file for two": (("--prompt", APPLE, "--prompt", FLOWER, "--out", "x.png"), "one file, x.png, for 2 pictures"),
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
    from flexclear.generate import _call_arguments

    settings = GenerateSettings(model="embedded", prompts=(APPLE,), out=tmp_path, text_len=32, guidance=3.0)
    with pytest.raises(ValueError, match="SomePipeline has no max_sequence_length"):
        _call_arguments("SomePipeline", settings, {"num_inference_steps": 50, "guidance_scale": 1.0})


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

    from flexclear.generate import _call_arguments

    parameters = inspect.signature(getattr(diffusers, kind).__call__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert {"prompt", "height", "width", "generator", "callback_on_step_end"} <= set(parameters)
    settings = GenerateSettings(model="embedded", prompts=(APPLE,), out=tmp_path, steps=4, text_len=32, guidance=3.0)
    given = _call_arguments(kind, settings, defaults)
    assert given == {"num_inference_steps": 4, "max_sequence_length": 32, **expected}
    inspect.signature(getattr(diffusers, kind).__call__).bind(None, prompt=APPLE, **given)


def test_sizes_are_checked_by_the_rule_of_each_family_s_pipeline(tmp_path):
    import diffusers

    from flexclear.generate_check import _skeleton, check_sizes

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
        pipe = _skeleton(str(folder), {"_class_name": kind, "vae": ["diffusers", vae_kind]})
        assert type(pipe).__name__ == kind
        settings = GenerateSettings(model="x", prompts=(APPLE,), out=tmp_path, sizes=((1024, 1040),))
        check_sizes(pipe, settings)
        settings = GenerateSettings(model="x", prompts=(APPLE,), out=tmp_path, sizes=((1024, 1032),))
        with pytest.raises(ValueError, match=f"{kind} draws sizes that are multiples of 16 pixels, got 1024x1032"):
            check_sizes(pipe, settings)


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
    assert "interrupted: 1 of 2 pictures are finished" in done.output
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
    with pytest.raises(ValueError, match="was not written by flexclear generate"):
        read_settings(tmp_path / "plain.png")
    content = png_bytes(Image.new("RGB", (2, 2)), {"prompt": "p", "seed": 1}, {"torch": "2"})
    (tmp_path / "ours.png").write_bytes(content)
    assert read_settings(tmp_path / "ours.png") == {"settings": {"prompt": "p", "seed": 1}, "versions": {"torch": "2"}}


def test_a_name_that_another_process_takes_first_is_left_to_it(tmp_path, monkeypatch):
    from flexclear import picture_files

    target = picture_files.Target.of(tmp_path, 1, False)
    (tmp_path / "0001_p.png").write_bytes(b"theirs")
    numbers = iter([0, 1])
    monkeypatch.setattr(picture_files, "_highest", lambda folder: next(numbers))
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
