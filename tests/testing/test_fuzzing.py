"""The fuzzer finds planted bugs, shrinks them, and prints Python that reproduces them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from flexclear.compile import why_not_compiled
from flexclear.masks import Disc, Layout, block_mask, boxes, dense_mask
from flexclear.testing import assert_matches_dense, fuzz, fuzzing, strategies
from flexclear.testing.checks import MAX_DENSE_PAIRS

SECONDS = 600
"""More than a finding takes on the busiest machine; a run ends with what it finds."""


def off_by_one_radius(layout, window, **options):
    return block_mask(layout, dataclasses.replace(window, radius=window.radius + 1), **options)


def swapped_sides(layout, window, **options):
    return block_mask(dataclasses.replace(layout, height=layout.width, width=layout.height), window, **options)


def partial_called_full(layout, window, **options):
    mask = block_mask(layout, window, **options)
    row = int(mask.kv_num_blocks[0, 0].argmax())
    if int(mask.kv_num_blocks[0, 0, row]):
        place = int(mask.full_kv_num_blocks[0, 0, row])
        last = int(mask.kv_num_blocks[0, 0, row]) - 1
        mask.full_kv_indices[0, 0, row, place] = mask.kv_indices[0, 0, row, last]
        mask.full_kv_num_blocks[0, 0, row] += 1
        mask.kv_num_blocks[0, 0, row] -= 1
    return mask


def forgotten_block(layout, window, **options):
    mask = block_mask(layout, window, **options)
    mask.kv_num_blocks[0, 0, -1] = (mask.kv_num_blocks[0, 0, -1] - 1).clamp_min(0)
    return mask


@pytest.mark.kept("forgotten_block")
@pytest.mark.parametrize("planted", [off_by_one_radius, swapped_sides, partial_called_full, forgotten_block])
def test_a_planted_bug_is_found_shrunk_and_printed(planted, monkeypatch):
    monkeypatch.setattr(fuzzing, "SHRINKING", SECONDS)
    report = fuzz(SECONDS, kinds=["disc"], attention=False, build=planted, seed=1)
    assert report.failure is not None, f"not found in {report.examples} examples"
    assert isinstance(report.error, AssertionError)
    layout = report.failure.layout
    assert layout.image_len <= 64, "it is not shrunk"
    with pytest.raises(
        AssertionError, match=r"mask_mod is wrong|is listed as full and is not|is needed and not listed"
    ):
        assert_matches_dense(
            layout, report.failure.window, block_size=report.failure.block_size, attention=False, build=planted
        )
    done = subprocess.run(
        [sys.executable, "-c", report.failure.as_python("cpu")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"the printed program does not run, or our own mask fails it: {done.stderr}"


def test_a_sound_mask_survives_and_the_examples_are_counted():
    counts = []
    report = fuzz(2, attention=False, on_example=counts.append)
    assert report.failure is None
    assert report.examples == counts[-1] == len(counts)


@pytest.mark.skipif(why_not_compiled(torch.device("cpu")) is not None, reason="compiled FlexAttention cannot run here")
def test_attention_is_checked_too():
    layout, window = Layout(16, 16, text_len=32), Disc(4)
    assert_matches_dense(layout, window)
    wrong = dense_mask(layout, window)
    wrong[40, 41] = ~wrong[40, 41]
    with pytest.raises(AssertionError, match=r"mask_mod is wrong for 1 of 82944 pairs, first for query 40 and key 41"):
        assert_matches_dense(layout, window, reference=wrong)


def own_rule(layout):
    return lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() % 7 < 3


def test_a_factory_of_your_own_is_fuzzed():
    assert fuzz(1, own=own_rule, attention=False).failure is None
    seen = fuzz(SECONDS, own=own_rule, attention=False, build=lambda *a, **k: forgotten_block(*a, **k), seed=1)
    assert seen.failure is not None
    assert "import own_rule" in seen.failure.as_python("cpu")


def test_the_command_exits_with_status_0_and_counts():
    command = [sys.executable, "-m", "flexclear", "fuzz", "--seconds", "2", "--window", "disc", "--masks-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "examples" in done.stdout
    assert "no failure" in done.stdout


def test_the_command_exits_with_status_1_and_prints_the_failure(tmp_path):
    (tmp_path / "mine.py").write_text("def rule(layout):\n    return lambda b, h, q, k: q - k\n")
    command = [sys.executable, "-m", "flexclear", "fuzz", "--seconds", "5", "--own", "mine:rule", "--masks-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "from mine import rule" in done.stdout
    assert "must return a bool tensor" in done.stdout


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fuzz(0), "seconds must be positive, got 0"),
        (lambda: fuzz(1, kinds=["discus"]), "kinds of windows are disc, square, .* got discus"),
        (lambda: fuzz(1, kinds=[]), "got none"),
    ],
)
def test_bad_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def drawn(turn, kinds=strategies.KINDS, examples=40):
    """Some cases of a round."""
    cases = []

    @settings(max_examples=examples, database=None, derandomize=True)
    @given(fuzzing.cases(kinds, turn=fuzzing.ROUNDS[turn]))
    def look(case):
        cases.append(case)

    look()
    return cases


@pytest.mark.parametrize("turn", fuzzing.ROUNDS)
def test_every_kind_of_window_is_drawn_in_every_round_and_fits(turn):
    for kind in strategies.KINDS:
        cases = drawn(turn, [kind], examples=4)
        assert {type(case.window).__name__.lower() for case in cases} == {kind}
        for case in cases if turn in ("masks", "references") else ():
            assert_matches_dense(case.layout, case.window, block_size=case.block_size, attention=False, around=False)


def test_rounds_hold_the_layouts_that_they_are_for():
    assert any(case.layout.references for case in drawn("references"))
    clips = drawn("clips", examples=100)
    assert all(case.layout.frames > 1 for case in clips)
    assert {type(case.layout.order) for case in clips} == {str, tuple}
    long = drawn("long", examples=100)
    assert all(max(case.layout.height, case.layout.width) > 40 for case in long)
    assert any(case.layout.seq_len**2 <= MAX_DENSE_PAIRS for case in long), "all pairs of some are asked"
    assert any(getattr(case.window, "radius", 0) > 40 for case in long)
    assert all((-(-case.layout.seq_len // 16)) ** 2 > boxes._FEW_PAIRS for case in drawn("grouped"))
    assert all(case.layout.image_len > 1 << 16 for case in drawn("large"))
    assert any(case.layout.text_len and not case.layout.text_first for case in drawn("large"))


def test_shrinking_ends_in_time(monkeypatch):
    monkeypatch.setattr(fuzzing, "SHRINKING", -1)
    report = fuzz(SECONDS, kinds=["disc"], attention=False, build=off_by_one_radius, seed=1)
    assert report.failure is not None
    assert isinstance(report.error, AssertionError)
