"""Blocks and kernel options that were found fastest: kept, taken by ``transform``, forgotten; no file stops a call."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import flexclear
from flexclear import cli
from flexclear.compile import tuned
from flexclear.compile.kernels import Kernel, choose
from flexclear.masks import Layout
from flexclear.measuring import tuning
from flexclear.runtime.hooks import entry_hook_of

from helpers.models import tiny_flux

CPU = torch.device("cpu")
DIM = 16
"""Head dim of the tiny model."""


@pytest.fixture(autouse=True)
def _own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXCLEAR_CACHE", str(tmp_path))
    tuned._entries.cache_clear()
    yield
    tuned._entries.cache_clear()


def keep(radius=16, dtype=torch.float32, **changes):
    place = tuned.place_of(CPU, dtype, DIM, radius)
    place = tuned.Place(**{**vars(place), **changes})
    return tuned.keep(tuned.Tuned(place, (32, 64), (("fwd_num_warps", 8),), 1.25, "64 x 64"))


def kernel(r=16, seq_len=1000, **options):
    settings = entry_hook_of(flexclear.transform(tiny_flux(), r=r, **options)).settings
    return settings.kernel("flex", CPU, torch.float32, seq_len, backward=False)


def default(seq_len=1000):
    return choose(CPU, torch.float32, DIM, seq_len=seq_len)


def test_a_transformed_model_has_what_was_kept_for_its_radius():
    assert kernel() == default()
    keep()
    assert kernel() == choose(CPU, torch.float32, DIM, seq_len=1000, block_size=(32, 64))
    assert kernel(r=20).block_size == (32, 64), "radii around share an entry"
    assert kernel(r=8) == default()
    assert kernel(r=16, block_size=64).block_size == (64, 64), "what was asked for wins"
    assert kernel(r=16, seq_len=1 << 20) == default(1 << 20)
    assert kernel(r={"single_transformer_blocks": 4, "default": 16}) == default()


def test_the_entry_reaches_the_mask_that_a_call_runs_with():
    keep()
    model = flexclear.transform(tiny_flux(), r=16)
    told = flexclear.explain(model, height=1024, width=1024, text_len=0)
    assert "tuned by flexclear bench --tune: " in str(told)
    # 4096 queries in blocks of 32, 4096 keys in blocks of 64.
    assert told.layers[0].cost.full + told.layers[0].cost.partial + told.layers[0].cost.skipped == 128 * 64


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": "torch 2.8.0"},
        {"device": "another"},
        {"dtype": "bfloat16"},
        {"head_dim": 64},
        {"backward": True},
        {"radius": 8},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_entry_for_anything_else_is_not_found(changes):
    keep(**changes)
    assert kernel() == default()


def test_radii_go_to_the_nearest_power_of_two():
    assert [tuned.radius_class(r) for r in (1, 6, 8, 11, 12, 16, 22, 23, 32)] == [1, 8, 8, 8, 16, 16, 16, 32, 32]


def edited(**changes):
    file = keep()
    content = json.loads(file.read_text())
    content["entries"][0].update(changes)
    return json.dumps(content)


BROKEN = {
    "cut off": lambda: "{",
    "another program's": lambda: '{"kernels": []}',
    "a later format": lambda: '{"format": 2, "entries": []}',
    "no entries": lambda: '{"format": 1}',
    "blocks": lambda: edited(block_size=[33, 64]),
    "an unknown option": lambda: edited(options=[["EVIL", 1]]),
    "an unsafe option": lambda: edited(options=[["ROWS_GUARANTEED_SAFE", True]]),
    "place": lambda: edited(place={"device": 3}),
    "nested": lambda: "[" * 100_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_one_warning_and_stops_nothing(name, caplog):
    content = BROKEN[name]()
    tuned.path().parent.mkdir(exist_ok=True)
    tuned.path().write_text(content)
    tuned._entries.cache_clear()
    assert kernel() == kernel() == default()
    (line,) = [record.getMessage() for record in caplog.records if "tuned.json" in record.getMessage()]
    assert line.startswith(f"{tuned.path()} is ignored")
    assert "\n" not in line
    # The next tuning replaces it.
    keep()
    assert kernel().block_size == (32, 64)


def test_forgetting_deletes_the_file_and_takes_effect():
    file = keep()
    assert kernel().block_size == (32, 64)
    done = CliRunner().invoke(cli.app, ["bench", "--forget"])
    assert (done.exit_code, done.stdout) == (0, f"deleted {file}\n")
    assert not file.exists()
    assert kernel() == default()
    done = CliRunner().invoke(cli.app, ["bench", "--forget"])
    assert (done.exit_code, done.stdout) == (0, f"nothing was kept in {file}\n")


def test_doctor_says_what_is_kept():
    keep()
    keep(radius=8, versions="torch 2.8.0")
    done = CliRunner().invoke(cli.app, ["doctor", "--quick", "--device", "cpu", "--json"])
    (line,) = json.loads(done.stdout)["tuned"]
    assert "r about 16: blocks 32 x 64, fwd_num_warps=8 (1.25 x the default at 64 x 64 tokens" in line


LAYOUT = Layout(64, 64)


def settle(*seconds):
    blocks = [(128, 64), (64, 64), (128, 128)]
    trials = [tuning.Trial(Kernel(size), list(own)) for size, own in zip(blocks, seconds, strict=False)]
    return tuning.settle([*trials, tuning.Trial(Kernel((16, 16)), [], "failed")], LAYOUT, 16, DIM, CPU, torch.float32)


def test_the_fastest_by_ratios_in_the_same_rounds_is_kept():
    # Rounds of a machine whose speed changes: medians alone would prefer the third.
    outcome = settle((1.0, 1.0, 8.0), (0.8, 0.8, 6.4), (0.7, 1.1, 9.0))
    assert outcome.gain == pytest.approx(1.25)
    assert kernel().block_size == (64, 64)
    assert "kept for transform" in tuning.table([outcome])
    assert "| 16 | 16 x 16 |  | not run |  | failed |" in tuning.table([outcome])


def test_luck_in_half_of_the_rounds_and_what_was_given_up_do_not_win():
    assert settle((1.0, 1.0, 1.0, 1.0), (0.5, 0.5, 0.9, 1.1)).kept is not None
    assert settle((1.0, 1.0, 1.0, 1.0), (0.5, 0.5, 1.1, 1.1)).kept is None
    assert kernel() == default()
    assert settle((1.0, 1.0, 1.0, 1.0), (0.5, 0.5, 0.5)).kept is None


def test_a_gain_within_noise_keeps_the_default_and_drops_what_was_kept():
    keep()
    outcome = settle((1.0, 1.0, 1.0), (0.99, 0.99, 0.99), (1.2, 1.2, 1.2))
    assert outcome.kept is None
    assert kernel() == default()
    assert "r = 16: the default is kept." in tuning.table([outcome])


def test_candidates_begin_with_the_default_and_are_all_different():
    defaults = [choose(CPU, torch.bfloat16, 128, seq_len=4608), Kernel((256, 256)), Kernel((256, 256))]
    found = list(tuning.candidates(CPU, torch.bfloat16, 128, 4608, defaults))
    assert found[:2] == defaults[:2]
    assert len(set(found)) == len(found) >= 6


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)], ids=str)
def test_candidates_of_a_gpu_are_kernels_that_can_be_kept(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    gpu = torch.device("cuda", 0)
    default = choose(gpu, torch.bfloat16, 128, seq_len=4608)
    found = list(tuning.candidates(gpu, torch.bfloat16, 128, 4608, [default]))
    assert found[0] == default
    assert len(set(found)) == len(found) > 20
    for kernel in found:
        options = dict(kernel.options)
        assert kernel.block_size[0] % options["fwd_BLOCK_M"] == kernel.block_size[1] % options["fwd_BLOCK_N"] == 0
    place = tuned.Place("a GPU", "torch", "bfloat16", 128, 16, False)
    for kernel in found[:3]:
        tuned.keep(tuned.Tuned(place, kernel.block_size, kernel.options, 1.1, "64 x 64"))
        tuned._entries.cache_clear()
        kept = tuned._entries()[place]
        assert (kept.block_size, kept.options) == (kernel.block_size, kernel.options), "as it was, from the file"
