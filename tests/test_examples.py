"""Each script of examples/ runs at small size, and what it leaves is looked at."""

from __future__ import annotations

import argparse
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flexclear
from flexclear import embedded
from flexclear.families import FAMILIES

from helpers.models_video import tiny_wan
from helpers.pipelines_video import TEXT, wan_parts

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.name for path in FOLDER.glob("*.py"))
PROMPT = "a red apple on a blue background"


@pytest.fixture(autouse=True)
def _as_found(tmp_path, monkeypatch):
    """Examples run on the CPU, in a folder of their own, and leave nothing in this process."""
    families, logger = list(FAMILIES), logging.getLogger("flexclear")
    level = logger.level
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    FAMILIES[:] = families
    logger.setLevel(level)


def run(monkeypatch, name, *arguments):
    """Run an example as ``python examples/NAME ARGUMENTS``, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(FOLDER / name), run_name="__main__")


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_generate_draws_what_the_windowed_pipeline_draws(monkeypatch, capsys):
    options = ("--model", "embedded", "--prompt", PROMPT, "--size", "64x96", "--r", 4, "--steps", 1)
    students = Path(embedded.model_directory()).parent / "students"
    run(monkeypatch, "generate.py", *options, "--backend", "sdpa", "--weights", students / "clear_local_4.safetensors")
    assert "image.png: 64 x 96" in capsys.readouterr().out
    pipe = flexclear.transform(embedded.pipeline(), r=4, backend="sdpa")
    call = {"height": 64, "width": 96, "num_inference_steps": 1}
    plain = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call).images[0]
    flexclear.load_weights(pipe, "embedded", filename="clear_local_4.safetensors")
    right = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call).images[0]
    assert np.array_equal(pixels("image.png"), np.asarray(right))
    assert not np.array_equal(np.asarray(plain), np.asarray(right))


def test_serve_sizes_serves_each_size_and_compiles_nothing_late(monkeypatch, capsys):
    options = ("--model", "embedded", "--r", 2, "--steps", 1, "--requests", 3, "--sizes", "64x64", "48x96")
    run(monkeypatch, "serve_sizes.py", *options, "--backend", "sdpa", "--no-compile")
    assert [pixels(f"served/{number}.png").shape[:2] for number in range(3)] == [(64, 64), (48, 96), (64, 64)]
    said = capsys.readouterr().out
    assert "6 attention layers" in said
    assert "compiled while serving: 0 graphs" in said


def test_own_mask_is_right_and_another_one_is_not(monkeypatch, capsys):
    names = run(monkeypatch, "own_mask.py", "--size", "9x14", "--no-attention")
    said = capsys.readouterr().out
    assert "right in both orders" in said
    assert "6 attention layers" in said
    assert "cross_3" in said
    layout = flexclear.masks.Layout(9, 14, text_len=5)
    for wrong in (names["cross_mask_mod"](layout, 2), names["Cross"](2)):
        with pytest.raises(AssertionError):
            names["assert_matches_dense"](
                layout, wrong, reference=names["cross_by_definition"](layout, 3), attention=False
            )


def test_own_model_is_right(monkeypatch, capsys):
    run(monkeypatch, "own_model.py")
    said = capsys.readouterr().out
    assert "MyTransformer2DModel: right" in said
    assert "output, compiled blocks" in said
    assert "2 x disc_r4" in said


def test_two_processes_draw_the_image_of_one(monkeypatch, capsys):
    options = ["--model", "embedded", "--size", "128x64", "--radius", "3", "--steps", "2", "--backend", "sdpa", "--out"]
    run(monkeypatch, "two_processes.py", *options, "one.png")
    assert "one.png: 128 x 64 by 1 processes" in capsys.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(FOLDER / "two_processes.py"), *options, "two.png"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "two.png: 128 x 64 by 2 processes" in done.stdout
    for rank in range(2):
        assert float(re.search(rf"rank {rank} has sent (\S+) MiB", done.stdout)[1]) > 0
    # Rounding in float32 moves a value to the next of 256 at most.
    assert np.abs(pixels("one.png") - pixels("two.png")).max() <= 1


def test_distil_trains_and_draws_with_its_weights(monkeypatch, capsys, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, caption in enumerate((PROMPT, "a yellow lemon on a red background")):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(caption)
    options = ("--model", "embedded", "--data", pictures, "--output", "run", "--r", 2, "--steps", 2, "--batch-size", 1)
    small = ("--held-out", 0, "--optimizer", "adamw", "--backend", "sdpa", "--sample", 64, "--sample-steps", 1)
    run(monkeypatch, "distil.py", *options, *small)
    assert re.search(r"loss: \d+\.\d+ at first, \d+\.\d+ in step 2", capsys.readouterr().out)
    assert pixels("run/sample.png").shape == (64, 64, 3)
    pipe = flexclear.transform(embedded.pipeline(), r=2)
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    before = weight.detach().clone()
    flexclear.load_weights(pipe, "run/weights.safetensors")
    assert not torch.equal(pipe.transformer.transformer_blocks[0].attn.to_q.weight, before)


def test_video_has_the_frames_that_were_asked_for(monkeypatch, capsys):
    from diffusers import WanPipeline

    WanPipeline(**wan_parts(tiny_wan(text_dim=TEXT))).save_pretrained("wan")
    options = ("--model", "wan", "--size", "48x64", "--frames", 9, "--r", 2, "--frame-radius", 1, "--steps", 1)
    run(monkeypatch, "video.py", *options, "--backend", "sdpa")
    said = capsys.readouterr().out
    assert "3 x 3 x 4 = 36 video tokens" in said
    assert "tube_r2_t1" in said
    assert "video.gif: 9 frames of 48 x 64" in said
    with Image.open("video.gif") as video:
        assert (video.n_frames, video.size) == (9, (64, 48))


class Parsed(Exception):
    """Raised in place of what would follow the arguments."""


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_that_an_example_names_have_options_that_it_knows(name, monkeypatch):
    text = (FOLDER / name).read_text(encoding="utf-8").split('"""')[1]
    commands = [line for line in text.splitlines() if re.match(rf"    .*examples/{name}", line)]
    assert commands
    if name == "serve_cluster.py":  # the others need nothing beside the package
        pytest.importorskip("ray.serve", reason="Ray Serve is not installed (ray[serve])")
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    if "argparse" in (FOLDER / name).read_text(encoding="utf-8"):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        for command in commands:
            words = shlex.split(command.partition(f"examples/{name}")[2], comments=True)
            with pytest.raises(Parsed):
                run(monkeypatch, name, *(word for word in words if word != "..."))


def test_every_example_is_listed():
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\S+)\]", listed, re.M) == re.findall(r"\((\S+\.py)\)", listed)
    assert sorted(re.findall(r"\((\S+\.py)\)", listed)) == NAMES
