"""Whatever is done with a transformed model: called, trained, copied, pickled, shared by threads, transformed again, restored."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import flexclear

from .oracle import RADIUS, TOLERANCE, expected, far, gradients, run, same, stacked, twins, under
from .shapes import ALTERNATING, Shape
from .table import cases, every


def transformed(row, **options):
    return flexclear.transform(row.build(), **{"r": RADIUS, "backend": "sdpa", **row.frames, **options})


def padded(row):
    """A small call, with padded text where the family takes any."""
    return row.padded(next(iter(row.paddings)), height=8, width=9) if row.paddings else Shape(8, 9, 9, 2)


@every()
def test_the_result_comes_as_the_caller_asks_for_it_and_the_arguments_stay_the_caller_s(row):
    model = transformed(row)
    call = row.call(padded(row))
    before = copy.deepcopy(call)
    with torch.no_grad():
        as_object, as_tuple = model(**call), model(**call, return_dict=False)
        first = next(iter(call))
        positional = model(call[first], **{name: value for name, value in call.items() if name != first})
    assert isinstance(as_tuple, tuple)
    assert as_object["sample"] is as_object.sample
    assert torch.equal(stacked(as_object), stacked(as_tuple))
    assert torch.equal(stacked(as_object), stacked(positional))
    assert call.keys() == before.keys()
    for ours, theirs in zip(tree_leaves(call), tree_leaves(before), strict=True):
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)
            assert vars(ours) == {}
        else:  # or an object that has no equal, such as a cache
            assert ours == theirs or type(ours).__eq__ is object.__eq__


@every()
def test_sizes_and_texts_alternate_and_come_back_to_the_same_bits(row):
    model, plain = twins(row)
    flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa")
    found = []
    for shape in ALTERNATING:
        found.append(run(model, row.call(shape)))
        same(found[-1], expected(row, plain, shape), str(shape))
    assert torch.equal(found[0], found[-1])


@pytest.mark.brief
@every()
def test_restore_is_bit_identical_and_leaves_nothing_behind(row):
    model = row.build()
    call = row.call(padded(row))
    before, processors, keys = run(model, call), processors_of(model), list(model.state_dict())
    assert flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa") is model
    assert list(model.state_dict()) == keys
    assert processors_of(model).keys() == processors.keys()
    far(run(model, call), before, "the window")
    assert flexclear.restore(model) is model
    assert torch.equal(run(model, call), before)
    assert all(processors_of(model)[name] is processor for name, processor in processors.items())
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not module._forward_pre_hooks_with_kwargs
        assert not module._forward_hooks_with_kwargs
    flexclear.restore(model)
    assert torch.equal(run(model, call), before)


@pytest.mark.brief
@every()
def test_a_saved_model_comes_back_with_its_window(row, tmp_path):
    model = transformed(row)
    call = row.call(padded(row))
    model.save_pretrained(tmp_path)
    loaded = flexclear.from_pretrained(type(model), tmp_path).eval()
    assert repr(flexclear.summary(loaded)) == repr(flexclear.summary(model))
    # Of a copy: weights in a file's memory lie where the header's length puts them, and BLAS sums by alignment.
    assert torch.equal(run(copy.deepcopy(loaded), call), run(model, call))


def processors_of(model):
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


@every()
def test_the_last_transform_holds(row):
    model, plain = twins(row)
    shape = Shape()
    hooks = len([hook for module in transformed(row).modules() for hook in module._forward_pre_hooks])
    flexclear.transform(
        flexclear.transform(model, r=2, **row.frames, backend="sdpa"), r=5, **row.frames, backend="sdpa"
    )
    assert len([hook for module in model.modules() for hook in module._forward_pre_hooks]) == hooks
    same(run(model, row.call(shape)), expected(row, plain, shape, r=5))
    flexclear.restore(model)
    assert torch.equal(run(model, row.call(shape)), run(plain, row.call(shape)))


@every()
def test_a_deep_copy_is_transformed_and_restored_on_its_own(row):
    model, call = row.build(), row.call(padded(row))
    dense = run(model, call)
    local = run(flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa"), call)
    copied = copy.deepcopy(model)
    flexclear.restore(model)
    assert torch.equal(run(copied, call), local)
    assert torch.equal(run(flexclear.restore(copied), call), dense)
    far(local, dense, "the window")


@every()
def test_a_pickled_model_is_windowed_and_can_be_restored(row):
    model, call = row.build(), row.call(padded(row))
    dense = run(model, call)
    local = run(flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa"), call)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(run(loaded, call), local)
    assert torch.equal(run(flexclear.restore(loaded), call), dense)


@every()
def test_two_models_and_many_threads_do_not_mix(row):
    calls = {shape: row.call(shape) for shape in (Shape(8, 8), Shape(6, 11))}
    models = {r: transformed(row, r=r) for r in (2, 4)}
    alone = {(r, shape): run(model, call) for r, model in models.items() for shape, call in calls.items()}
    wrong = []

    def work(r, shape):
        for _ in range(5):
            # A busy machine may share out a sum in another way.
            found = run(models[r], calls[shape])
            if (found - alone[r, shape]).abs().max() > TOLERANCE * alone[r, shape].abs().max():
                wrong.append((r, shape))

    threads = [threading.Thread(target=work, args=key) for key in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@cases(lambda row: row.texts(height=8, width=9))
def test_training_has_the_gradients_of_the_dense_mask_with_and_without_checkpointing(row, shape):
    call = row.call(shape)
    for ntk_factor in (1.0, 10.0) if "ntk" in row.abilities else (1.0,):
        model, plain = twins(row)
        if ntk_factor != 1:
            row.stretch(plain, ntk_factor)
        flexclear.transform(model.train(), r=RADIUS, **row.frames, ntk_factor=ntk_factor)
        with under(row, shape):
            theirs = gradients(plain.train(), call)
        ours = again = gradients(model, call)
        if "checkpointing" in row.abilities:
            model.enable_gradient_checkpointing()
            again = gradients(model, call)
        largest = max(gradient.abs().max() for gradient in theirs if gradient is not None)
        for (name, _), mine, repeated, right in zip(model.named_parameters(), ours, again, theirs, strict=True):
            assert (mine is None) == (repeated is None) == (right is None), name
            if right is not None:
                assert (mine - right).abs().max() <= TOLERANCE * largest, name
                assert (repeated - right).abs().max() <= TOLERANCE * largest, name
        assert len([gradient for gradient in theirs if gradient is not None]) > 25


@every()
def test_a_plan_made_in_inference_mode_serves_training_afterwards(row):
    model, call = transformed(row), row.call(padded(row))
    with torch.inference_mode():
        made_here = tree_map_only(torch.Tensor, torch.clone, call)
        inferred = stacked(model(**made_here)).clone()
    trained = stacked(model(**call))
    trained.square().mean().backward()
    same(trained.detach(), inferred)


@every()
def test_an_exception_inside_leaves_the_model_usable(row):
    model, call = transformed(row), row.call(padded(row))
    before = run(model, call)
    _, block = row.blocks(model)[-1]
    hook = block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        run(model, call)
    hook.remove()
    assert torch.equal(run(model, call), before)


def fail(*args):
    raise RuntimeError("inside")


@every()
def test_a_block_that_is_called_alone_is_refused(row):
    plain, call = row.build(), row.call(padded(row))
    seen = {}
    for name, block in row.blocks(plain):
        block.register_forward_pre_hook(keeping(seen, name), with_kwargs=True)
    run(plain, call)
    model = transformed(row)
    for name, block in row.blocks(model):
        if name == "noise_refiner" or name not in seen:
            continue  # a ControlNet has the one for its own, and calls it; the other is for references
        args, kwargs = seen[name]
        with pytest.raises(ValueError, match="called without its window"):
            block(*args, **kwargs)


def keeping(seen, name):
    def keep(module, args, kwargs):
        seen[name] = args, kwargs

    return keep
