"""A transformed model equals the plain diffusers model under the dense mask of the window, in every way of being asked."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.utils._pytree import tree_leaves

import flexclear

from .oracle import RADIUS, expected, far, run, same, twins
from .row import Row
from .shapes import REFERENCES, SIZES, Shape
from .table import cases, every, keep, noise

pytestmark = pytest.mark.filterwarnings("ignore:flexclear. a reference image")


def tensors(call):
    """All tensors of a call's arguments."""
    return [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor)]


def both_orders(model, row, shape, reference, call=None, **options):
    """The model transformed in each token order equals ``reference``."""
    call = row.call(shape) if call is None else call
    for order in ("tiled", "raster"):
        flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa", order=order, **options)
        same(run(model, call), reference, (order, str(shape)))


@pytest.mark.brief("9x13")
@every()
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_a_transformed_model_equals_the_plain_one_under_the_dense_mask(row, shape):
    model, plain = twins(row, head_64=True)
    reference = expected(row, plain, shape)
    far(run(plain, row.call(shape)), reference, "the window")
    far(expected(row, plain, shape, r=RADIUS + 1), reference, "one token more of radius")
    both_orders(model, row, shape, reference)


@pytest.mark.brief("8x12")
@every("references")
@pytest.mark.parametrize("shape", REFERENCES, ids=str)
def test_reference_images_are_further_grids_in_the_same_plane(row, shape):
    model, plain = twins(row, head_64=True)
    reference = expected(row, plain, shape)
    far(run(plain, row.call(shape)), reference, "the window")
    both_orders(model, row, shape, reference)


def padded(row, **sizes):
    """A call with each kind of padded text, with a reference image where there are any."""
    references = ((5, 9),) if "references" in row.abilities else ()
    return [row.padded(kind, references=references, **sizes) for kind in row.paddings]


@pytest.mark.brief("12x10")
@cases(lambda row: padded(row) + padded(row, height=12, width=10, text_len=66), "padding")
def test_padded_text_is_masked_in_each_sample(row, shape):
    model, plain = twins(row, head_64=True)
    reference = expected(row, plain, shape)
    far(expected(row, plain, shape, padding=False)[-1:], reference[-1:], "the padding of the shortest")
    both_orders(model, row, shape, reference)


@cases(padded, "padding")
def test_layers_left_dense_keep_the_padding(row, shape):
    model, plain = twins(row)
    call = row.call(shape)
    same(run(flexclear.transform(model, r=None, backend="sdpa"), call), run(plain, call))


@cases(lambda row: [row.padded(kind) for kind, hidden in row.paddings.items() if hidden], "padding")
def test_text_that_is_hidden_has_no_say(row, shape):
    model, call = flexclear.transform(row.build(), r=RADIUS, **row.frames, backend="sdpa"), row.call(shape)
    before = run(model, call)
    text = next((name for name in ("encoder_hidden_states", "text_bth") if name in call), None)
    if text is not None:
        hidden = ~(row.keep or keep)(shape)
        changed = call[text] + 5 * hidden.view(*hidden.shape, *[1] * (call[text].ndim - 2))
        assert torch.equal(row.image(run(model, {**call, text: changed}), shape), row.image(before, shape))
    else:  # captions of their own lengths: the places behind the shorter one
        longer = [call["cap_feats"][0], *(noise(len(each), each.shape[1]) for each in call["cap_feats"][1:])]
        same(run(model, {**call, "cap_feats": longer})[:1], before[:1])


@every("residuals")
def test_controlnet_residuals_follow_the_token_order(row):
    model, plain = twins(row)
    shape = Shape(batch=2, padding=next(iter(row.paddings), None))
    residuals = row.residuals(shape)
    call = {**row.call(shape), **copy.deepcopy(residuals)}
    reference = expected(row, plain, shape, call)
    far(expected(row, plain, shape), reference, "the ControlNet")
    flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa")
    same(run(model, call), reference)
    assert all(
        torch.equal(one, other)
        for one, other in zip(tensors(call), tensors({**row.call(shape), **residuals}), strict=True)
    )
    for name, wrong in row.residuals(dataclasses.replace(shape, height=shape.height + 1)).items():
        with pytest.raises(ValueError, match=rf"{name}.*of shape \(2, "):
            run(model, {**call, name: wrong})


@cases(lambda row: row.texts() + ([REFERENCES[0]] if "references" in row.abilities else []), "ntk")
def test_an_ntk_factor_is_a_larger_base_of_the_rotary_frequencies(row, shape):
    model, plain = twins(row, head_64=True)
    stretched = copy.deepcopy(plain)
    row.stretch(stretched, 10.0)
    call, reference = row.call(shape), expected(row, stretched, shape)
    far(expected(row, plain, shape), reference, "the factor")
    both_orders(model, row, shape, reference, ntk_factor=10.0)
    flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa")
    before = run(model, call)
    with flexclear.override(ntk_factor=10.0):
        same(run(model, call), reference)
    assert torch.equal(run(model, call), before)


@cases(Row.texts)
def test_proportional_attention_scales_the_scores_and_not_what_a_mask_adds(row, shape):
    model, plain = twins(row)
    flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa", proportional_attention=True)
    call, reference = row.call(shape), expected(row, plain, shape, proportional=True)
    same(run(model, call), reference)
    with flexclear.override(proportional_attention=False):
        far(run(model, call), reference, "the scale")


@every("ids")
def test_positions_above_256_stay_exact_although_bfloat16_rounds_the_ids(row):
    model, plain = twins(row)
    shape = Shape(270, 6, 4)
    call, reference = row.call(shape), expected(row, plain, shape)
    call[row.ids] = call[row.ids].to(torch.bfloat16)
    same(run(flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa"), call), reference)
    flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa", exact_position_ids=False)
    far(run(model, call), reference, "rounding of ids")


@every("fuse")
def test_fused_projections_are_windowed_whenever_they_were_fused(row):
    early, plain = twins(row)
    late = flexclear.transform(copy.deepcopy(early), r=RADIUS, **row.frames, backend="sdpa")
    shape = Shape(batch=2)
    call, reference = row.call(shape), expected(row, plain, shape)
    row.fuse(early)
    same(run(flexclear.transform(early, r=RADIUS, **row.frames, backend="sdpa"), call), reference)
    row.fuse(late)
    if row.fusing_replaces:
        with pytest.raises(RuntimeError, match=r"was given a Fused\w+ after .*transform\(model"):
            run(late, call)
        flexclear.transform(late, r=RADIUS, **row.frames, backend="sdpa")
    same(run(late, call), reference)


@cases(Row.texts, "ip-adapter")
def test_an_ip_adapter_gives_what_it_gives_under_the_dense_mask(row, shape):
    model, _ = twins(row)
    call = {**row.call(shape), **row.adapter(model, shape)}
    plain, keys = copy.deepcopy(model), set(model.state_dict())
    reference = expected(row, plain, shape, call)
    both_orders(model, row, shape, reference, call)
    far(run(model, row.call(shape)), reference, "the adapter")
    assert set(model.state_dict()) == keys
    assert torch.equal(run(flexclear.restore(model), call), run(plain, call))


@every("ip-adapter")
@pytest.mark.parametrize("backend", ["sdpa", "traced"])
def test_an_ip_adapter_of_as_many_tokens_as_the_image_is_told_apart_from_it(row, backend):
    model, _ = twins(row)
    shape = Shape(9, 13, 20, 2)
    row.adapter(model, shape)
    images = {"ip_hidden_states": [noise(shape.batch, shape.height * shape.width, 12)]}
    call = {**row.call(shape), "joint_attention_kwargs": images}
    reference = expected(row, copy.deepcopy(model), shape, call)
    flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa")
    if backend == "traced":
        flexclear.optimize(model, backend="eager")
    same(run(model, call), reference)
    torch.compiler.reset()


@every("pooled keys")
@pytest.mark.parametrize(("height", "width"), [(12, 8), (9, 13)])
def test_image_queries_alone_see_the_mean_of_each_cell(row, height, width):
    model, plain = twins(row, head_64=True)
    shape = Shape(height, width, batch=2)
    reference = expected(row, plain, shape, down_factor=4)
    far(expected(row, plain, shape), reference, "the pooled keys")
    both_orders(model, row, shape, reference, down_factor=4)


@every()
def test_bfloat16_errs_no_more_than_the_plain_model_in_bfloat16(row):
    shape = Shape(batch=2)
    call = row.call(shape)
    exact = expected(row, row.build(), shape)
    half = {name: value if name == "position_ids" else lower(value) for name, value in call.items()}
    plain = row.build().to(torch.bfloat16)
    theirs = (expected(row, plain, shape, half).float() - exact).norm()
    ours = (run(flexclear.transform(plain, r=RADIUS, **row.frames, backend="sdpa"), half).float() - exact).norm()
    assert ours <= 1.5 * theirs
    assert theirs < 0.1 * exact.norm()


def lower(value):
    """Floating-point inputs in bfloat16; times that it would round, and positions, as they are."""
    if isinstance(value, list):
        return [lower(part) for part in value]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    half = value.to(torch.bfloat16)
    wanted = torch.equal(half.float(), value) if value.ndim == 1 else value.shape[-1] > 3
    return half if wanted else value
