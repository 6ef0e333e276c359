"""What a step is predicted by: fitted, kept and published rates, and the work that they are applied to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flexclear
from flexclear.explanation.work import linear_flops
from flexclear.masks import Disc, Layout, cost
from flexclear.measuring.models import call_of, few_blocks, find_model
from flexclear.rates import kept
from flexclear.rates.rates import PUBLISHED, Rates, Seconds, block_flops, fit_windows

from helpers.models import tiny_flux

CPU = torch.device("cpu")
TRUE = Rates("made up", dense=7e11, full=6e11, partial=2e11, linear=8e11, token=3e-12, call=2e-4)
RESULTS = Path(__file__).parents[1] / "bench" / "results"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("FLEXCLEAR_CACHE", str(tmp_path))
    return tmp_path


def layers(rates):
    costs = [
        cost(Layout(side, side), Disc(r), channels=256, block_size=size)
        for side in (16, 48, 64)
        for r in (4, 8, 16)
        for size in (64, 128)
    ]
    return [(one, rates.windowed_s(one)) for one in costs]


def test_rates_that_times_were_made_of_are_found_again():
    full, partial, call = fit_windows(layers(TRUE))
    assert (full, partial, call) == pytest.approx((TRUE.full, TRUE.partial, TRUE.call), rel=1e-6)


def test_no_rate_is_negative_whatever_was_measured():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        noisy = [(one, time * math.exp(float(torch.randn(1, generator=generator)))) for one, time in layers(TRUE)[::4]]
        full, partial, call = fit_windows(noisy)
        assert full > 0
        assert partial > 0
        assert call >= 0
    with pytest.raises(ValueError, match="need a measurement"):
        fit_windows([])


def test_few_measurements_tell_one_rate():
    one = layers(TRUE)[8:9]
    rate = sum(block_flops(one[0][0])) / one[0][1]
    assert fit_windows(one) == pytest.approx((rate, rate, 0))
    full, partial, call = fit_windows(layers(TRUE)[6:9])
    assert full == partial
    assert call == 0


def keep(model="flux.1-dev", **changes):
    about = {**kept.facts(CPU, torch.bfloat16), "model": model, "head_dim": 128, **changes}
    return kept.keep(model, about, {"rates": kept.as_json(TRUE), "rows": []})


def test_what_was_measured_here_is_predicted_with(folder):
    assert kept.rates_for(CPU, torch.bfloat16, 128) is PUBLISHED[128]
    assert "published, of an H100" in str(flexclear.explain(1024, 1024))
    file = keep()
    assert file.parent == folder / "bench"
    found = kept.rates_for(CPU, torch.bfloat16, 128)
    assert found.source == f"measured here with flux.1-dev ({file})"
    assert kept.as_json(found) == kept.as_json(TRUE)
    keep(compiled=True)
    assert f"measured here with flux.1-dev, blocks compiled ({file})" in str(kept.rates_for(CPU, torch.bfloat16, 128))
    keep()
    if not torch.cuda.is_available():
        told = flexclear.explain(2048, 2048, r=8)
        assert str(found) in str(told)
        spent = told.cost
        rest = 2 * 12 * 3072**2 * 16896 / TRUE.linear + 16896 * 3072 * TRUE.token
        assert told.layer.gain == pytest.approx(
            (spent.dense_flops / TRUE.dense + rest) / (TRUE.windowed_s(spent) + rest)
        )


@pytest.mark.parametrize(
    "changes",
    [{"device": "another"}, {"dtype": "float32"}, {"head_dim": 64}, {"torch": "2.8.0"}],
    ids=["device", "type", "head dim", "torch"],
)
def test_what_was_measured_otherwise_is_not(folder, changes):
    keep(**changes)
    assert kept.rates_for(CPU, torch.bfloat16, 128) is PUBLISHED[128]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": 1}', '{"format": 1, "facts": {}, "rates": {"dense": 0}}', "\udcff"],
    ids=["cut off", "no mapping", "no facts", "no rates", "no text"],
)
def test_a_broken_file_is_named_once_and_not_used(folder, content, caplog):
    file = keep()
    good = json.loads(file.read_text())
    if content.startswith('{"format": 1, "facts"'):
        content = json.dumps({**good, "rates": {**good["rates"], "dense": 0}})
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert kept.rates_for(CPU, torch.bfloat16, 128) is PUBLISHED[128]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{file} is ignored")


def test_published_rates_give_the_published_steps_of_flux_on_an_h100():
    measured = {1024: 1.01, 2048: 1.49, 4096: 3.42, 8192: 11.77}
    assert "| r = 16 | 8192 | 7497.6 | 11.77 x |" in (RESULTS / "gpu.md").read_text()
    for side, gain in measured.items():
        spent = cost(Layout(side // 16, side // 16), Disc(16), block_size=64)
        tokens = (side // 16) ** 2 + 512
        rates = PUBLISHED[128]
        layer = Seconds(
            rates.windowed_s(spent), rates.dense_s(spent), rates.rest_s(24 * 3072**2 * tokens, 3072 * tokens)
        )
        assert layer.gain == pytest.approx(gain, rel=0.15)


@pytest.mark.parametrize("name", ["embedded", "sd3.5-large", "qwen-image"])
def test_linears_are_counted_as_a_step_runs_them(name):
    model = find_model(name, torch.float32)
    step = few_blocks(model, 1)
    call = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value
        for key, value in call_of(model, (6, 10), CPU, torch.float32).items()
    }
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        step(**call)
    counted = sum(number for kind, number in counter.get_flop_counts()["Global"].items() if "addmm" in str(kind))
    assert linear_flops(step, model.family, 60, model.text_len) == counted


def test_a_models_step_is_the_sum_of_its_layers_and_the_rest(folder):
    keep(head_dim=16, dtype="float32")
    model = flexclear.transform(tiny_flux(), r=[8, 8, None, 4])
    told = flexclear.explain(model, height=512, width=768, text_len=77)
    windows = sum(TRUE.windowed_s(told.layers[number].cost) for number in (0, 1, 3))
    dense = TRUE.dense_s(told.layers[2].cost)
    rest = linear_flops(model, flexclear.families.family_of(model), 32 * 48, 77) / TRUE.linear
    rest += 4 * (32 * 48 + 77) * 32 * TRUE.token
    assert told.seconds.attention == pytest.approx(windows + dense)
    assert told.seconds.dense == pytest.approx(4 * dense)
    assert told.seconds.rest == pytest.approx(rest)
    assert f"one step, predicted: {told.seconds}" in str(told)
    assert f"{told.seconds.gain:.2f} x" in str(told)
    assert "measured here with" in str(told)


def test_no_time_is_predicted_for_a_formula():
    told = flexclear.explain(flexclear.transform(tiny_flux(), attention="linear"), height=512, width=512)
    assert told.seconds is None
    assert "predicted" not in str(told)
