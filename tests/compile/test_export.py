"""torch.export and torch.jit of a transformed model say what to do instead."""

from __future__ import annotations

import pytest
import torch

import flexclear

from helpers.models import flux_call, tiny_flux

WHAT_TO_DO = r"call flexclear.restore\(model\) first. .*flexclear.save_artifacts\(pipe, path\)"


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_transformed_model_says_what_to_do(strict):
    model, call = tiny_flux(num_layers=1, num_single_layers=1), flux_call(6, 5, 4)
    flexclear.transform(model, r=2, backend="sdpa")
    with pytest.raises(RuntimeError, match=WHAT_TO_DO):
        torch.export.export(model, (), call, strict=strict)
    with torch.no_grad():
        assert model(**call).sample.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_of_a_transformed_model_says_what_to_do():
    model = flexclear.transform(tiny_flux(num_layers=1, num_single_layers=1), r=2, backend="sdpa")
    with pytest.raises(RuntimeError, match=WHAT_TO_DO):
        torch.jit.trace(model, example_kwarg_inputs=flux_call(6, 5, 4))


def test_a_restored_model_is_exported():
    model, call = tiny_flux(num_layers=1, num_single_layers=1), flux_call(6, 5, 4)
    flexclear.restore(flexclear.transform(model, r=2, backend="sdpa"))
    with torch.no_grad():
        exported = torch.export.export(model, (), call).module()
        assert torch.allclose(exported(**call).sample, model(**call).sample, atol=1e-6)
