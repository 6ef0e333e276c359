"""Distillation over two processes: DDP and FSDP against one process with the same batches, and how it is launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from flexclear.distill.config import LoraConfig, LossConfig

from helpers import distill_cases
from helpers.parallel_group import Group, free_port

ROUNDING = 1e-6
CLIPPED = {"max_grad_norm": 0.05}  # half of what the gradients have


@pytest.fixture(scope="module")
def two():
    group = Group(2)
    yield group
    group.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Runs of one process, whose accumulated batches are those of two."""
    folder = tmp_path_factory.mktemp("one")
    return {
        train: distill_cases.train(
            folder / train, gradient_accumulation=2, train=train, lora=LoraConfig(4, 8), **CLIPPED
        )
        for train in ("projections", "lora")
    }


def assert_equal_records(ours, theirs):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        for name, value in their.items():
            assert our[name] == pytest.approx(value, rel=1e-5), name


def assert_equal_files(ours, theirs):
    ours, theirs = load_file(ours), load_file(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= ROUNDING, name


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("train", ["projections", "lora"])
def test_two_processes_train_what_one_trains_with_their_batches(two, one, tmp_path, train):
    expected = one[train]
    found = two.results("train", tmp_path / "two", train=train, lora=LoraConfig(4, 8), **CLIPPED)
    for result in found:
        assert_equal_records(result["losses"], expected["losses"])
        assert_equal_records(result["held_out"], expected["held_out"])
        for name, weight in expected["weights"].items():
            assert np.abs(result["weights"][name] - weight).max() <= ROUNDING, name
    assert all(np.array_equal(a, b) for a, b in zip(*(result["weights"].values() for result in found), strict=True))
    assert_equal_files(tmp_path / "two" / "weights.safetensors", expected["file"])
    assert [record["step"] for record in lines(tmp_path / "two" / "losses.jsonl")] == [1, 2, 3, 4]
    assert [record["step"] for record in lines(tmp_path / "two" / "held_out.jsonl")] == [0, 4]
    first, last = expected["losses"][0]["loss"], expected["losses"][-1]["loss"]
    assert abs(first - last) > 1e-3, "nothing was learnt that could differ"


def test_the_first_process_writes_all_that_is_not_a_process_s_own(two, tmp_path):
    two.results("train", tmp_path, own_output=True, steps=1)
    files = {rank: sorted(p.name for p in (tmp_path / rank).rglob("*") if p.is_file()) for rank in "01"}
    assert files["1"] == ["random_states_1.pkl"]
    assert {"losses.jsonl", "held_out.jsonl", "weights.safetensors", "trained.safetensors", "run.json"} <= set(
        files["0"]
    )


def test_a_run_goes_on_with_as_many_processes_and_with_one(two, one, tmp_path):
    expected = one["projections"]
    for then in ("two", "one"):
        output = tmp_path / then
        first = two.results("train", output, steps=2, **CLIPPED)
        assert {result["steps"] for result in first} == {2}
        if then == "two":
            second = two.results("train", output, **CLIPPED)[1]
        else:
            second = distill_cases.train(output, gradient_accumulation=2, **CLIPPED)
        assert_equal_records(second["losses"], expected["losses"][2:])
        assert_equal_files(output / "weights.safetensors", expected["file"])
        assert [record["step"] for record in lines(output / "losses.jsonl")] == [1, 2, 3, 4]


def test_attention_alone_is_refused_where_processes_average_gradients(two, tmp_path):
    alone = LossConfig(flow=0, prediction=0)
    for kind, message in two.errors("train", tmp_path, losses=alone):
        assert kind == "ValueError"
        assert "several processes cannot average" in message
    assert distill_cases.train(tmp_path, losses=alone, steps=1)["steps"] == 1


def test_fsdp_that_accelerate_would_leave_out_is_refused(two, tmp_path):
    for kind, message in two.errors("fsdp_on_cpus", tmp_path):
        assert kind == "ValueError"
        assert "asks for FSDP, which it has only where there are several accelerators" in message
        assert "this run is MULTI_CPU" in message
    assert not any(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_fsdp_trains_what_one_process_trains_and_goes_on(two, one, tmp_path):
    for train, expected in one.items():
        output = tmp_path / train
        options = {"train": train, "lora": LoraConfig(4, 8), **CLIPPED}
        first = two.results("train_sharded", output, steps=2, **options)
        second = two.results("train_sharded", output, **options)
        for begun, ended in zip(first, second, strict=True):
            assert begun["parameters"] == ended["parameters"] == ["DTensor"]
            assert_equal_records(begun["losses"] + ended["losses"], expected["losses"])
        assert_equal_files(output / "weights.safetensors", expected["file"])


def test_missing_deepspeed_is_named_before_accelerate_looks_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        ImportError, match=r"asks for DeepSpeed, whose package is missing: pip install deepspeed\. FSDP"
    ):
        distill_cases.train(tmp_path)


def test_processes_that_accelerate_does_not_know_of_are_refused(tmp_path, monkeypatch):
    from accelerate import Accelerator

    alone = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but accelerate knows of 1"):
        distill_cases.train(tmp_path, accelerator=alone)


def test_accelerate_launch_runs_the_command_with_accelerate_s_own_settings(tmp_path):
    import flexclear
    from flexclear.distill.caching import cache

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 90, 10)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a red apple")
    cache(pictures, "embedded", tmp_path / "cache", text_len=16, pipe=flexclear.embedded.pipeline())
    settings = {
        "model": "embedded",
        "data": str(tmp_path / "cache"),
        "output": "run",
        "r": 4,
        "backend": "sdpa",
        "steps": 1,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    own = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",  # of CPUs accelerate itself starts only one
        "num_processes": 2,
        "num_machines": 1,
        "machine_rank": 0,
        "main_process_port": free_port(),
        "mixed_precision": "no",
    }
    (tmp_path / "accelerate.json").write_text(json.dumps(own))
    launch = ["accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.json")]
    launch += ["--gradient_accumulation_steps", "2", "--num_cpu_threads_per_process", "1"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "flexclear", "distill", str(tmp_path / "run.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("weights: ") == 1
    [place] = (tmp_path / "run" / "checkpoints").iterdir()
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {file.name for file in place.iterdir()}
    assert json.loads((place / "run.json").read_text())["identity"]["global_batch"] == 2 * 2
    assert len(lines(tmp_path / "run" / "losses.jsonl")) == 1
