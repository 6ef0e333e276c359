"""What a family does not support raises at the door, before any work, and leaves the model as it was."""

from __future__ import annotations

import re

import pytest
import torch

import flexclear

from .oracle import RADIUS, run
from .row import ABILITIES
from .shapes import Shape
from .table import ROWS, every

REFUSALS = [pytest.param(row, ability, id=f"{row.name}-{ability}") for row in ROWS for ability in row.refuses]


def outline(model):
    """What ``transform`` would have changed."""
    return {
        name: (getattr(module, "processor", None), list(module._forward_pre_hooks), list(module._forward_hooks))
        for name, module in model.named_modules()
    }


def refused(model, error, says, **options):
    before = outline(model)
    with pytest.raises(error, match=says):
        flexclear.transform(model, **options)
    assert outline(model) == before


@pytest.mark.brief
@pytest.mark.parametrize(("row", "ability"), REFUSALS)
def test_what_a_family_does_not_support_is_refused_by_name(row, ability):
    refusal = row.refuses[ability]
    model, shape = row.build(), Shape(8, 6, 5)
    if refusal.prepare is not None:
        refusal.prepare(model)
    if refusal.call is None and refusal.afterwards is None:
        refused(model, refusal.error, refusal.says, **{**row.frames, **refusal.transform})
        return
    flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa")
    before = run(model, row.call(shape))
    with pytest.raises(refusal.error, match=refusal.says):
        refusal.afterwards(model) if refusal.call is None else run(model, {**row.call(shape), **refusal.call(shape)})
    assert torch.equal(run(model, row.call(shape)), before)


def test_an_ntk_factor_of_one_call_is_refused_too():
    for row in ROWS:
        if "ntk" in row.refuses:
            model = flexclear.transform(row.build(), r=RADIUS, **row.frames, backend="sdpa")
            with flexclear.override(ntk_factor=2.0), pytest.raises(ValueError, match=row.refuses["ntk"].says):
                run(model, row.call(Shape()))


@every()
def test_foreign_processors_and_blocks_are_refused(row):
    refused(row.make(**row.no_block), ValueError, f"has no blocks in {'.*'.join(row.stacks)}: nothing to transform")
    for stack, name in row.stacks.items():
        model = row.build()
        model.get_submodule(stack)[0].get_submodule(name).processor = lambda *args, **kwargs: None
        refused(model, TypeError, re.escape(f"{stack}[0].{name} has a function; flexclear replaces"))
        around, _, last = name.rpartition(".")
        setattr(model.get_submodule(stack)[0].get_submodule(around), last, torch.nn.Linear(2, 2))
        refused(
            model,
            ValueError,
            rf"{stack}\[0\] of this {type(model).__name__} has no attention module named {name} \(found Linear",
        )


@pytest.mark.brief
@every()
def test_an_input_that_is_missing_is_named(row):
    model = flexclear.transform(row.build(), r=RADIUS, **row.frames, backend="sdpa")
    call = row.call(Shape(8, 6, 5))
    texts = (
        "encoder_hidden_states",
        "cap_feats",
        "text_bth",
        "encoder_hidden_states_t5",
        "encoder_hidden_states_llama3",
    )
    needed = ("hidden_states", *texts, row.ids, "x", "t", "text_lens", "encoder_attention_mask")
    for name in [name for name in needed if name in call and name not in row.optional]:
        with pytest.raises(ValueError, match=rf"needs {name} as a (tensor|list)"):
            run(model, {**call, name: None})


def test_every_ability_is_supported_refused_or_cannot_be_asked_for():
    for row in ROWS:
        assert set(row.refuses) | set(row.lacks) | row.abilities == set(ABILITIES)
        assert not set(row.refuses) & set(row.lacks)
        assert bool(row.paddings) == ("padding" in row.abilities)
        assert bool(row.residuals) == ("residuals" in row.abilities)
        assert bool(row.stretch) == ("ntk" in row.abilities)
        assert bool(row.adapter) == ("ip-adapter" in row.abilities)
        assert bool(row.fuse) == ("fuse" in row.abilities)
