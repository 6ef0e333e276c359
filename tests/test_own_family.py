"""A model class of a user's own: declared in a few lines, and checked; a wrong declaration is found."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import flexclear
from flexclear.compile import why_not_compiled
from flexclear.families import FAMILIES, TokensFamily, register
from flexclear.runtime.facts import JOINT
from flexclear.testing import check_family

from helpers.own_model import own_call, own_model

GRID = (9, 13)


@dataclasses.dataclass(frozen=True)
class OwnFamily(TokensFamily):
    """The model's mask of padded text is an argument; what it makes of it for attention stands for nothing more."""

    def read(self, model, kwargs, grids):
        call, mask = super().read(model, kwargs, grids), kwargs.get("prompt_mask")
        return call if mask is None or grids.all_true(mask) else dataclasses.replace(call, keep={JOINT: mask})


OWN = OwnFamily(
    model_class="OwnTransformer2DModel",
    processors=("OwnAttnProcessor",),
    stacks={"blocks": "attend"},
    carriers=("where",),
    text_first=False,
    given={"mask": None},
    text="prompt",
    ids="places",
)


@pytest.fixture(autouse=True)
def known():
    """The families that there are, afterwards as before."""
    before = list(FAMILIES)
    yield
    FAMILIES[:] = before


@pytest.fixture
def own():
    return register(OWN)


@pytest.mark.parametrize("padded", [False, True])
def test_a_registered_family_is_right_and_transform_knows_it(own, padded):
    model, call = own_model(), own_call(*GRID, padded=padded)
    report = check_family(model, call, grid=GRID)
    assert report.family is own
    assert set(report.errors) == {
        "output, tiled order",
        "output, raster order",
        "gradients",
        "gradients, checkpointing",
        "output, compiled blocks",
    }
    assert not report.left_out
    assert max(report.errors.values()) > 0
    assert "OwnTransformer2DModel: right" in str(report)
    flexclear.transform(model, r=3)
    assert flexclear.explain(model).layers[0].name == "blocks.0.attend"
    with pytest.raises(ValueError, match="needs the plain model"):
        check_family(model, call, grid=GRID)


@pytest.mark.skipif(why_not_compiled(torch.device("cpu")) is not None, reason="no compiler")
def test_every_block_of_a_model_that_is_compiled_as_a_whole_has_its_window(own):
    model, call = own_model(blocks=3), own_call(*GRID)
    with torch.no_grad():
        expected = flexclear.transform(model, r=3, backend="sdpa")(**call).sample
        # Dynamo traces FlexAttention; the eager backend runs it as it is.
        flexclear.compile.compile_whole(flexclear.transform(model, r=3, backend="flex"), backend="eager")
        assert (model(**call).sample - expected).abs().max() <= 1e-5
    torch.compiler.reset()


class ForgetsIds(OwnFamily):
    def enter(self, model, kwargs, plan, exact_ids, switches):
        changed, plan = super().enter(model, kwargs, plan, exact_ids, switches)
        return {**changed, "places": kwargs["places"]}, plan


class ForgetsToLeave(OwnFamily):
    def leave(self, model, output, plan):
        return output


class Gains(OwnFamily):
    def enter(self, model, kwargs, plan, exact_ids, switches):
        changed, plan = super().enter(model, kwargs, plan, exact_ids, switches)
        return {**changed, "prompt": changed["prompt"] * 1.0}, dataclasses.replace(
            plan, slots=tuple(dataclasses.replace(slot, gain=torch.tensor(1.1)) for slot in plan.slots)
        )


class MasksNothing(OwnFamily):
    def read(self, model, kwargs, grids):
        return TokensFamily.read(self, model, kwargs, grids)


class HalfTheBlocks(OwnFamily):
    def layers(self, model):
        yield from list(super().layers(model))[:1]


WRONG = {
    "text first": (OWN, {"text_first": True}, AssertionError, "off the plain model under the dense mask"),
    "ids in raster order": (ForgetsIds, {}, AssertionError, r"output, tiled order: .* Look at"),
    "output in tile order": (ForgetsToLeave, {}, AssertionError, r"output, tiled order: .* Look at"),
    "a gain": (Gains, {}, AssertionError, "output, tiled order"),
    "padding that is seen": (MasksNothing, {}, AssertionError, "output, tiled order"),
    "half of the blocks": (HalfTheBlocks, {}, AssertionError, "output, tiled order"),
    "a mask that nobody speaks for": (OWN, {"given": {}}, ValueError, "asks for attention under a mask"),
    "no such carrier": (OWN, {"carriers": ("leave",)}, ValueError, "called without its window"),
    "another processor": (OWN, {"processors": ("FluxAttnProcessor",)}, TypeError, "has a OwnAttnProcessor"),
    "no such stack": (OWN, {"stacks": {"layers": "attend"}}, ValueError, "no blocks in layers"),
    "no such attention": (OWN, {"stacks": {"blocks": "attn"}}, ValueError, "no attention module named attn"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_declaration_is_found(name):
    made, changes, error, says = WRONG[name]
    fields = {field.name: getattr(OWN, field.name) for field in dataclasses.fields(OWN)}
    register((made if isinstance(made, type) else type(made))(**{**fields, **changes}))
    model = own_model()
    before = model.blocks[0].attend.processor
    with pytest.raises(error, match=says):
        check_family(model, own_call(*GRID), grid=GRID)
    assert model.blocks[0].attend.processor is before


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("heads", "blocks.0.attend, a OwnAttention, needs an attribute heads"),
        ("inner_dim", "needs an attribute head_dim, .* or inner_dim"),
    ],
)
def test_attention_that_does_not_say_its_heads_is_refused(own, gone, says):
    model = own_model()
    delattr(model.blocks[0].attend, gone)
    before = model.blocks[0].attend.processor
    with pytest.raises(TypeError, match=says):
        flexclear.transform(model, r=3)
    assert model.blocks[0].attend.processor is before


def test_a_grid_that_the_family_reads_otherwise_is_found(own):
    with pytest.raises(
        AssertionError, match=r"reads the grids \(\(9, 13\),\) off this call, and they are \(\(13, 9\),\)"
    ):
        check_family(own_model(), own_call(*GRID), grid=(13, 9))


def test_what_shows_nothing_is_said(own):
    model, call = own_model(), own_call(*GRID)
    with pytest.raises(AssertionError, match="the window makes no difference"):
        check_family(model, call, grid=GRID, r=40)
    with pytest.raises(ValueError, match="a model in float32"):
        check_family(model.to(torch.bfloat16), call, grid=GRID)


def test_register_takes_a_family_that_says_what_it_must(own):
    with pytest.raises(ValueError, match="OwnTransformer2DModel is already registered"):
        register(OWN)
    other = dataclasses.replace(OWN, notes="another")
    assert register(other, replace=True) is other
    assert FAMILIES[-1] is other
    assert FAMILIES[-2] is not OWN
    with pytest.raises(TypeError, match=r"register takes a Family, .* got str"):
        register("OwnTransformer2DModel")
    for name in ("model_class", "processors", "stacks"):
        with pytest.raises(ValueError, match=f"a family needs {name}"):
            register(dataclasses.replace(OWN, **{name: type(getattr(OWN, name))()}))
    with pytest.raises(ValueError, match="a family needs carriers, or a carrier_argument"):
        register(dataclasses.replace(OWN, carriers=()))
    with pytest.raises(TypeError, match="processors must be a tuple of names, got 'OwnAttnProcessor'"):
        register(dataclasses.replace(OWN, processors="OwnAttnProcessor"), replace=True)
