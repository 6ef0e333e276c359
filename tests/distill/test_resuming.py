"""Runs that stop in any way, and resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

import flexclear
from flexclear.common.stopping import StopFlag
from flexclear.distill import MemorySamples, OptimizerConfig, distill
from flexclear.distill.config import CheckpointConfig, HeldOutConfig, LoraConfig
from flexclear.distill.students import trained_parameters

from helpers.full_disk import largest_file
from helpers.runs import assert_same_weights, seen


@pytest.mark.parametrize("changed", [{}, {"ema": 0.9, "gradient_accumulation": 2}, {"train": "lora"}], ids=str)
def test_a_run_in_two_parts_is_the_run_in_one(fresh, samples, settings, changed):
    whole, parts = fresh(), [fresh(), fresh()]
    schedule = OptimizerConfig("adamw", learning_rate=1e-3, schedule="constant_with_warmup", warmup_steps=2)
    config = settings("whole", optimizer=schedule, **changed)
    expected = distill(whole, config, samples)
    split = dataclasses.replace(config, output=config.output.with_name("parts"))
    first = distill(parts[0], dataclasses.replace(split, steps=3), samples)
    torch.manual_seed(12345)  # what else the process has drawn does not matter
    second = distill(parts[1], split, samples)
    assert seen(first.losses + second.losses) == seen(expected.losses)
    assert second.steps == 6
    assert second.held_out[-1] == expected.held_out[-1]
    for (name, a), b in zip(trained_parameters(whole).items(), trained_parameters(parts[1]).values(), strict=True):
        assert torch.equal(a, b), name
    lines = (split.output / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    written, again = load_file(expected.weights), load_file(second.weights)
    assert all(torch.equal(tensor, again[name]) for name, tensor in written.items())


def test_sigterm_keeps_the_step_it_falls_into(fresh, samples, settings):
    whole = distill(fresh(), settings("whole"), samples)
    config = settings()
    before = signal.getsignal(signal.SIGTERM)
    told = []

    def on_step(record):
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    first = distill(fresh(), config, samples, on_step=on_step, say=told.append)
    assert first.interrupted
    assert first.steps == 4
    assert "interrupted after 4 of 6" in told[-1]
    assert signal.getsignal(signal.SIGTERM) is before
    second = distill(fresh(), config, samples)
    assert seen(first.losses + second.losses) == seen(whole.losses)


def test_a_crash_loses_the_steps_since_the_last_checkpoint_and_leaves_no_half_of_one(fresh, samples, settings):
    whole = distill(fresh(), settings("whole"), samples)
    config = settings()

    def on_step(record):
        if record["step"] == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        distill(fresh(), config, samples, on_step=on_step)
    half = config.output / "checkpoints" / ".step_00000005.partial"
    half.mkdir()
    with (config.output / "losses.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    second = distill(fresh(), config, samples)
    assert seen(second.losses) == seen(whole.losses[3:])
    assert not half.exists()
    lines = (config.output / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_only_the_last_checkpoints_stay(fresh, samples, settings):
    config = settings(checkpoints=CheckpointConfig(every=1, keep=2))
    distill(fresh(), config, samples)
    assert sorted(place.name for place in (config.output / "checkpoints").iterdir()) == [
        "step_00000005",
        "step_00000006",
    ]


def test_another_runs_checkpoint_is_refused_by_name(fresh, samples, settings):
    config = settings(steps=1)
    distill(fresh(), config, samples)
    model = fresh()
    with pytest.raises(ValueError, match=r"other settings \(r: 2 then, 3 now; "):
        distill(model, dataclasses.replace(config, r=3, steps=2), samples)
    with pytest.raises(ValueError, match="other settings"):
        distill(model, dataclasses.replace(config, seed=4), samples)


def test_a_loss_that_is_not_finite_stops_the_run(fresh, samples, settings):
    broken = MemorySamples([dataclasses.replace(s, mean=s.mean * 1e37) for s in samples.samples])
    for count, message in (
        (0, "the loss of step 1 is (inf|nan).*no checkpoint yet"),
        (2, "held-out samples after step 0"),
    ):
        with pytest.raises(FloatingPointError, match=message):
            distill(fresh(), settings(held_out=HeldOutConfig(count=count)), broken)
    assert not (settings().output / "held_out.jsonl").exists()


@pytest.mark.parametrize("norm", [1.0, 0.0])
def test_weights_that_are_not_finite_never_replace_good_ones(fresh, samples, settings, norm):
    model, output = fresh(), settings().output

    def break_after_four(record):
        if record["step"] == 4:
            next(iter(trained_parameters(model).values())).register_hook(lambda gradient: gradient * float("nan"))

    config = settings(steps=5, max_grad_norm=norm, held_out=HeldOutConfig(count=0))
    told = "gradient norm of step 5 is nan" if norm else "parameter is not finite after step 5"
    with pytest.raises(FloatingPointError, match=rf"{told}.*step_00000003 is kept"):
        distill(model, config, samples, on_step=break_after_four)
    assert [place.name for place in (output / "checkpoints").iterdir()] == ["step_00000003"]
    assert not (output / "weights.safetensors").exists()


@pytest.mark.parametrize("room", [40_000, 150_000], ids=["of safetensors", "of torch.save"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_the_run_resumes_from_it(fresh, samples, settings, room):
    expected = distill(fresh(), settings("whole"), samples)
    config = settings("parts")
    with contextlib.ExitStack() as disk:
        seen_by = lambda record: record["step"] == 5 and disk.enter_context(largest_file(room))  # noqa: E731
        with pytest.raises(OSError, match=r"checkpoint of step 6 cannot be written.*step_00000003 is kept"):
            distill(fresh(), config, samples, on_step=seen_by)
    assert [place.name for place in (config.output / "checkpoints").iterdir()] == ["step_00000003"]
    assert not (config.output / "weights.safetensors").exists()
    again = distill(fresh(), config, samples)
    assert seen(again.losses) == seen(expected.losses[3:])
    assert (config.output / "losses.jsonl").read_text().count("\n") == 6
    assert_same_weights(expected.weights, again.weights)


def test_a_run_never_resumes_with_other_data_of_the_same_number(fresh, samples, settings):
    samples.work = "one"  # as the index of a cache has it
    distill(fresh(), settings(steps=3), samples)
    samples.work = "another"
    with pytest.raises(ValueError, match="contents: one then, another now"):
        distill(fresh(), settings(), samples)
    samples.work = "one"
    assert distill(fresh(), settings(), samples).steps == 6


def test_a_run_resumes_under_its_own_window_only(fresh, samples, settings):
    distill(flexclear.transform(fresh(), r=2, backend="sdpa"), settings(steps=1), samples)
    for changed, message in (
        ({"r": 3}, r"windows: Disc\(radius=2\) then, Disc\(radius=3\) now"),
        ({"r": [2, 3, *[2] * 5]}, r"windows: Disc\(radius=2\) then, of 2 kinds"),
        ({"r": 2, "ntk_factor": 10.0}, "switches: "),
    ):
        with pytest.raises(ValueError, match=f"other settings .*{message}"):
            distill(flexclear.transform(fresh(), backend="sdpa", **changed), settings(steps=2), samples)
    assert distill(flexclear.transform(fresh(), r=2), settings(steps=2), samples).steps == 2


@pytest.mark.parametrize("train", ["projections", "lora"])
def test_a_run_resumes_with_its_own_teacher_only(fresh, samples, settings, train):
    config = settings(steps=1, train=train, lora=LoraConfig(4, 8))
    model = fresh()
    distill(model, config, samples)
    longer = dataclasses.replace(config, steps=2)
    with pytest.raises(ValueError, match=r"weights: .* now\)\. A model that has been trained is not its own teacher"):
        distill(model, longer, samples)  # it would learn from itself
    assert distill(fresh(), longer, samples).steps == 2


def test_the_first_signal_asks_the_run_to_stop_and_the_second_ends_it():
    before = signal.getsignal(signal.SIGINT)
    with StopFlag() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_in_another_thread_leaves_signals_alone():
    def handler():
        with StopFlag() as stop:
            return signal.getsignal(signal.SIGTERM), stop()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler).result() == (signal.getsignal(signal.SIGTERM), False)
