"""``flexclear generate --batch``, ``--offload``, ``--vae-tiling`` and ``--memory``."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import flexclear
from flexclear.generation.generate import Wish, in_calls
from flexclear.generation.memory import check_offload, offload
from flexclear.generation.settings import GenerateSettings
from flexclear.images.files import read_settings

from helpers.generate_calls import APPLE, FLOWER, pixels

CPU = torch.device("cpu")


def test_a_batch_draws_the_images_that_calls_of_one_draw_and_keeps_their_numbers(generate):
    arguments = ("--prompt", APPLE, "--prompt", FLOWER, "--seed", 1, "--seed", 2, "--r", 4)
    alone, together = generate(*arguments, out="alone"), generate(*arguments, "--batch", 3, out="together")
    assert [line["batch"] for line in together] == [3, 3, 3, 1]
    for one, other in zip(alone, together, strict=True):
        assert one["path"].rpartition("/")[2] == other["path"].rpartition("/")[2]
        assert (one["prompt"], one["seed"]) == (other["prompt"], other["seed"])
        pair = [np.frombuffer(pixels(line)[1], np.uint8).astype(int) for line in (one, other)]
        assert abs(pair[0] - pair[1]).max() <= 1, "one in 255 of rounding"
    assert read_settings(together[0]["path"])["settings"]["batch"] == 3
    assert "batch" not in read_settings(alone[0]["path"])["settings"]


def test_a_batch_that_was_interrupted_is_completed(generate, tmp_path):
    arguments = ("--prompt", APPLE, "--seed", 1, "--seed", 2, "--seed", 3, "--r", 4, "--batch", 2)
    lines = generate(*arguments)
    (tmp_path / "out" / lines[1]["path"].rpartition("/")[2]).unlink()
    [again] = generate(*arguments, "--resume")
    assert (again["path"], again["seed"], again["batch"]) == (lines[1]["path"], 2, 1)


def test_a_call_takes_images_of_one_size_that_follow_one_another():
    sizes = [(64, 64), (64, 64), (64, 64), (64, 96), (64, 64)]
    wishes = [Wish(number, "a", size, 0) for number, size in enumerate(sizes, 1)]
    assert [[wish.number for wish in call] for call in in_calls(wishes, 2)] == [[1, 2], [3], [4], [5]]


def test_negative_prompts_and_images_are_those_of_every_image_of_a_batch(generate, tmp_path):
    [first] = generate("--prompt", APPLE, "--r", 4, out="first")
    arguments = ("--prompt", APPLE, "--prompt", FLOWER, "--r", 4, "--image", first["path"], "--strength", 0.9)
    arguments += ("--negative-prompt", "a sunflower", "--true-cfg-scale", 2)
    alone, together = generate(*arguments, out="alone"), generate(*arguments, "--batch", 2, out="together")
    for one, other in zip(alone, together, strict=True):
        pair = [np.frombuffer(pixels(line)[1], np.uint8).astype(int) for line in (one, other)]
        assert abs(pair[0] - pair[1]).max() <= 1


def test_memory_is_that_of_the_process_on_a_cpu(generate, command, tmp_path):
    [line] = generate("--prompt", APPLE, "--r", 4, "--memory")
    assert line["peak_memory_of"] == "process"
    assert 1e8 < line["peak_memory_bytes"] < 1e11


SEEN = """
import torch
from flexclear.generation.memory import Peak
peak, seen = Peak(torch.device("cpu"), process=True), []
for count in (50_000_000, 200_000_000):
    peak.begin()
    ballast = torch.ones(count, dtype=torch.uint8)
    peak.end()
    del ballast
    seen.append(peak.bytes_seen)
assert seen[1] - seen[0] > 1e8, seen
"""


def test_a_peak_is_that_of_its_own_time():
    """In a process of its own: elsewhere what was released stays with the process, and a ballast fits into that."""
    subprocess.run([sys.executable, "-c", SEEN], check=True)


def test_tiles_are_asked_of_the_vae_and_told(generate):
    [line] = generate("--prompt", APPLE, "--r", 4, "--vae-tiling")
    assert read_settings(line["path"])["settings"]["vae_tiling"] is True


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 32, "output_type": "np"}
    return pipe(APPLE, generator=torch.Generator().manual_seed(3), **arguments).images


def test_a_pipeline_offloaded_in_groups_draws_the_same():
    # Onto a CPU, which --offload refuses: the hooks are the real ones, and come back with each group.
    plain = draw(flexclear.transform(flexclear.embedded.pipeline(), r=3, backend="sdpa"))
    pipe = flexclear.transform(flexclear.embedded.pipeline(), r=3, backend="sdpa")
    offload(pipe, "group", CPU)
    assert all(hasattr(block, "_diffusers_hook") for block in pipe.transformer.transformer_blocks)
    assert hasattr(pipe.vae.decoder.conv_in, "_diffusers_hook")
    assert np.array_equal(draw(pipe), plain)


@pytest.mark.parametrize(
    ("how", "method"), [("model", "enable_model_cpu_offload"), ("sequential", "enable_sequential_cpu_offload")]
)
def test_the_other_offloads_are_the_pipeline_s_own(how, method, monkeypatch):
    pipe, asked = flexclear.embedded.pipeline(), []
    monkeypatch.setattr(type(pipe), method, lambda pipe, device: asked.append(device))
    offload(pipe, how, torch.device("cuda:1"))
    assert asked == [torch.device("cuda:1")]


def test_a_part_that_cannot_be_offloaded_in_groups_is_named(monkeypatch, tmp_path):
    import diffusers

    monkeypatch.setattr(diffusers.AutoencoderKL, "_supports_group_offloading", False)
    config = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    settings = GenerateSettings(model="m", prompts=(APPLE,), out=tmp_path, offload="group")
    with pytest.raises(
        ValueError, match="--offload group: the vae of m, a AutoencoderKL, does not take it; give model"
    ):
        check_offload(config, settings, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("how", ["model", "sequential", "group"])
def test_an_offloaded_pipeline_draws_the_same_on_a_gpu(how):
    plain = draw(flexclear.transform(flexclear.embedded.pipeline(device="cuda"), r=3))
    pipe = flexclear.transform(flexclear.embedded.pipeline(), r=3)
    offload(pipe, how, torch.device("cuda"))
    assert abs(draw(pipe) - plain).max() <= 1 / 255
