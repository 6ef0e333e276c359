"""NTK that is clipped at linear interpolation, and proportional attention of models trained with fewer tokens."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import flexclear
from flexclear.runtime.switches import proportional_gain

from helpers.flux_reference import ReferenceProcessor, double, reference_model
from helpers.models import flux_call, tiny_flux

GRID, TEXT = (9, 13), 7


class Clipped(ReferenceProcessor):
    """Rotary frequencies of a base 1000 times as large, none below ``floor`` times that of theta."""

    floor = 0.8

    def rotate(self, tokens):
        angles = []
        for y, x in self.places():
            for place, channels in ((0, 4), (y, 6), (x, 6)):
                for pair in range(channels // 2):
                    own = 10000 ** (-2 * pair / channels)
                    angles.append(place * max(own * 1000 ** (-2 * pair / channels), self.floor * own))
        angles = torch.tensor(angles, dtype=torch.float64).view(len(self.places()), 8)
        turned = torch.view_as_complex(tokens.unflatten(-1, (8, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(-2)


def run(model, call):
    with torch.no_grad():
        return model(**call).sample


@pytest.mark.parametrize("order", ["tiled", "raster"])
def test_clipped_frequencies_equal_the_float64_reference(order):
    model = tiny_flux()
    call = flux_call(*GRID, TEXT, batch=2)
    expected = run(reference_model(copy.deepcopy(model), [Clipped(3, GRID, TEXT) for _ in range(4)]), double(call))
    flexclear.transform(model, r=3, order=order, backend="sdpa")
    plain = run(model, call)
    with flexclear.override(ntk_factor=1000.0, ntk_floor=0.8):
        assert (run(model, call) - expected).abs().max() <= 1e-4
    with flexclear.override(ntk_factor=1000.0):
        unclipped = run(model, call)
    assert (unclipped - expected).abs().max() > 1e-3
    with flexclear.override(ntk_factor=1000.0, ntk_floor=1.0):
        assert (run(model, call) - plain).abs().max() <= 1e-5, "a floor of one leaves every frequency"


def test_a_floor_is_refused_where_it_is_not_known_and_out_of_range(sd3):
    flexclear.transform(sd3, r=3, backend="sdpa")
    with (
        flexclear.override(ntk_floor=0.5),
        pytest.raises(ValueError, match=r"ntk_floor=0.5 is defined for FluxTransformer2DModel, got SD3"),
    ):
        sd3("a", height=32, width=32, num_inference_steps=1, max_sequence_length=8)
    for given, error, message in (
        ({"ntk_floor": 1.5}, ValueError, "a share of each frequency, 0 to 1, got 1.5"),
        ({"ntk_floor": "1"}, TypeError, "ntk_floor must be a number"),
        ({"training_tokens": 1}, ValueError, "training_tokens must be 2 or more, got 1"),
        ({"training_tokens": 8.5}, TypeError, "training_tokens must be a whole number"),
    ):
        with pytest.raises(error, match=message), flexclear.override(**given):
            pytest.fail("entered")


def test_proportional_attention_counts_from_the_tokens_of_training():
    device = torch.device("cpu")
    assert proportional_gain(320, False, device, 320).item() == pytest.approx(1)
    assert proportional_gain(1088, False, device, 320).item() == pytest.approx(
        math.sqrt(math.log(1088) / math.log(320))
    )
    model = flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    call = flux_call(*GRID, TEXT)
    tokens = GRID[0] * GRID[1] + TEXT
    with flexclear.override(proportional_attention=True, training_tokens=tokens):
        assert (run(model, call) - run(flexclear.transform(model, r=3, backend="sdpa"), call)).abs().max() <= 1e-5
        same = run(model, call)
    with flexclear.override(proportional_attention=True):
        assert (run(model, call) - same).abs().max() > 1e-4
