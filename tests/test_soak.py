"""The soak test passes on the library as it is, and finds leaks and wrong images that are planted into it."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from flexclear.cli import app
from flexclear.runtime.attention import windowed_attention
from flexclear.runtime.carrying import Hook
from flexclear.runtime.hooks import EntryHook
from flexclear.runtime.plan import plans
from flexclear.tools.soak import Bounds, soak_test
from flexclear.tools.soak_calls import Settings, calls, load, perform

SMALL = Settings(backend="sdpa", sizes=2, largest=64, text_lens=(8,), lora=False, seed=1)
NO_SAMPLES = Bounds(samples=0, warm_up=4)


def short(bounds=NO_SAMPLES, count=10, settings=SMALL):
    return soak_test(settings, bounds, seconds=600, max_calls=count)


@pytest.mark.kept
def test_dozens_of_calls_with_swaps_and_interruptions_leave_everything_bounded_and_pictures_the_same():
    from diffusers.utils import logging

    before = plans.max_bytes, logging.get_verbosity()
    found = short(Bounds(samples=3, warm_up=8), 32, replace(SMALL, sizes=4, largest=128, lora=True))
    assert found.failures == []
    assert (found.calls, found.compared, found.difference, found.graphs) == (32, 3, 0.0, 0)
    assert found.swaps >= 3
    assert found.stopped >= 1
    assert found.growth_mib < 16
    assert found.plan_entries > 3
    assert (plans.max_bytes, logging.get_verbosity()) == before


@pytest.mark.kept
def test_graphs_are_counted_against_the_sizes_that_were_seen(monkeypatch):
    settings = replace(SMALL, sizes=1, compile=True, compile_backend="eager", lora=True)
    found = short(count=4, settings=settings)
    assert 0 < found.graphs <= found.graphs_bound == 4
    monkeypatch.setattr("flexclear.tools.soak.GRAPHS_PER_SIZE", 0)
    torch.compiler.reset()
    assert any("graphs, more than 0" in failure for failure in short(count=1, settings=settings).failures)
    torch.compiler.reset()


def test_a_planted_leak_is_found(monkeypatch):
    hoard, plan = [], EntryHook.plan

    def leaking(self, *args):
        hoard.append(torch.ones(1 << 21))  # 8 MiB
        return plan(self, *args)

    monkeypatch.setattr(EntryHook, "plan", leaking)
    found = short(Bounds(samples=0, warm_up=0), 24)
    assert found.growth_mib > 16
    assert any("memory grew by" in failure for failure in found.failures)
    assert "flexclear soak --seed 1 --calls 24" in str(found)


@pytest.mark.kept
def test_a_planted_wrong_picture_is_found_with_the_call_that_draws_it(monkeypatch):
    count = itertools.count()

    def drifting(*args):
        return windowed_attention(*args) * (1 + 1e-3 * (next(count) > 30))

    monkeypatch.setattr("flexclear.runtime.call_plan.windowed_attention", drifting)
    found = short(replace(NO_SAMPLES, samples=2), 12)
    wrong = [failure for failure in found.failures if "a fresh process draws another image" in failure]
    assert found.compared == 2
    assert wrong
    assert "Call(number=" in wrong[0]


def test_a_hook_that_is_left_behind_is_found(monkeypatch):
    def leaving(pipe, swap, call, settings):
        picture = perform(pipe, swap, call, settings)
        pipe.transformer.norm_out.register_forward_hook(LeftBehind())
        return picture

    monkeypatch.setattr("flexclear.tools.soak.perform", leaving)
    failures = " ".join(short(count=2).failures)
    had, has = map(int, re.search(r"the model had (\d+) hooks, and now has (\d+)", failures).groups())
    assert has == had + 1


class LeftBehind(Hook):
    def __call__(self, module, args, output):
        return None


def test_a_plan_cache_that_passes_its_bound_is_found(monkeypatch):
    get = plans.get

    def hoarding(key, build):
        bound, plans.max_bytes = plans.max_bytes, 1 << 40
        found = get(key, build)
        plans.max_bytes = bound
        return found

    monkeypatch.setattr(plans, "get", hoarding)
    found = short(replace(NO_SAMPLES, plans_mib=0), 12)
    assert any("the plan cache holds" in failure for failure in found.failures)


def test_a_run_that_is_too_short_to_judge_memory_is_no_success():
    assert "only 2 calls: 28 are needed" in short(count=2).failures[0]


def test_the_command_exits_with_1_and_says_which_call_failed(monkeypatch):
    def broken(*args):
        raise RuntimeError("planted")

    monkeypatch.setattr("flexclear.runtime.call_plan.windowed_attention", broken)
    done = CliRunner().invoke(app, ["soak", "--calls", "9", "--backend", "sdpa", "--samples", "0", "--seed", "4"])
    assert done.exit_code == 1
    assert "FAILURE: RuntimeError in Call(number=0" in done.output
    assert "flexclear soak --seed 4 --calls 1" in done.output


def test_the_calls_are_the_seed_s():
    def first(seed, count=300):
        return list(itertools.islice(calls(replace(SMALL, sizes=4, lora=True, seed=seed), 8), count))

    assert first(1) == first(1) != first(2)
    drawn = first(1)
    assert len({(call.height, call.width) for call in drawn}) <= 4
    assert all(call.height % 8 == 0 for call in drawn)
    assert {call.r for call in drawn} == set(SMALL.radii)
    assert 10 <= sum(call.stop for call in drawn) <= 60
    assert len({call.lora for call in drawn}) > 10
    assert None in {call.lora for call in drawn}


def test_a_model_of_one_s_own_is_a_function_that_makes_it(tmp_path, monkeypatch):
    (tmp_path / "own_pipe.py").write_text("from flexclear.embedded import pipeline\n")
    monkeypatch.chdir(tmp_path)
    assert type(load(replace(SMALL, model="own_pipe:pipeline"))).__name__ == "FluxPipeline"
    with pytest.raises(ValueError, match="'nowhere:nothing' cannot be loaded"):
        load(replace(SMALL, model="nowhere:nothing"))
