"""What derives from a class of diffusers and computes something else is refused by name, in every family."""

from __future__ import annotations

import copy

import pytest
import torch

import flexclear
from flexclear.families import family_of
from flexclear.masks import all_frames
from flexclear.runtime.exchange import put_processor

from contract.table import ROWS
from helpers.interruptions import same, state_of
from helpers.parallel_families import build

WINDOW = all_frames(2)
"""Of images and of videos."""


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def model(request):
    return request.param.build()


def derived(module, **changes):
    """A class that derives from the module's own."""
    return type("Derived", (type(module),), changes)


def computing(self, *args, **kwargs):
    raise AssertionError("never run")


def kinds(model):
    """The first layer of each kind: of its module, of its processor, and of the blocks' stack."""
    layers = family_of(model).layers(model)
    return {
        (type(layer.module), type(layer.module.processor), layer.name.split(".")[0], layer.scope): layer
        for layer in reversed(list(layers))
    }.values()


def refused(model, message):
    before = state_of(model)
    with pytest.raises(TypeError, match=message):
        flexclear.transform(model, r=WINDOW)
    assert same(state_of(model), before)


def test_processors_that_derive_from_those_of_diffusers_are_refused(model):
    for layer in kinds(model):
        own = layer.module.processor
        for changes in ({"__call__": computing}, {}):
            put_processor(layer.module, derived(own, **changes)())
            refused(model, rf"has a Derived; flexclear replaces .*{type(own).__name__}.*, not what derives from them")
        put_processor(layer.module, own)
    flexclear.transform(model, r=WINDOW)


def test_processors_that_derive_from_ours_are_refused_and_stay(model):
    flexclear.transform(model, r=WINDOW)
    layer = next(iter(kinds(model)))
    theirs = copy.copy(layer.module.processor)
    theirs.__class__ = derived(theirs)
    put_processor(layer.module, theirs)
    refused(model, "has a Derived; flexclear replaces")
    with pytest.warns(UserWarning, match=rf"Derived on {layer.name}\. "):
        flexclear.restore(model)
    assert layer.module.processor is theirs


@pytest.mark.parametrize("part", ["model", "block", "attention"])
def test_a_forward_of_its_own_is_refused_and_a_subclass_without_is_what_its_base_is(model, part):
    for layer in kinds(model):
        block = model.get_submodule(layer.name.rpartition(".")[0])
        module = {"model": model, "block": block, "attention": layer.module}[part]
        own = type(module)
        module.__class__ = derived(module, forward=computing)
        refused(model, rf"is a Derived, which has a forward of its own in place of {own.__name__}'s")
        module.__class__ = type("Harmless", (own,), {"note": "of somebody's own"})
        flexclear.restore(flexclear.transform(model, r=WINDOW))
        module.__class__ = own


def test_a_harmless_subclass_of_the_model_gives_what_its_base_gives():
    plain, call = build("flux")
    harmless = copy.deepcopy(plain)
    harmless.__class__ = derived(plain)
    with torch.no_grad():
        one, other = (flexclear.transform(each, r=3, backend="sdpa")(**call).sample for each in (plain, harmless))
    assert torch.equal(one, other)
