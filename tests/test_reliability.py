"""A call that is interrupted anywhere leaves the model as it was: the next one equals a fresh model's bit for bit."""

from __future__ import annotations

import functools
import gc
import re

import pytest
import torch

import flexclear
from flexclear.compile import compile_blocks, compile_whole, quantize
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.carrying import Hook
from flexclear.runtime.memory import note
from flexclear.runtime.plan import plans

from helpers.models import flux_call, tiny_flux
from helpers.models_packed import longcat_call, tiny_longcat

HEIGHT, WIDTH, TEXT = 12, 9, 7


class Breakable:
    """A backend of ``torch.compile`` that runs graphs eagerly, and raises where it is told to: while a graph is compiled,
    or the n-th time that one runs."""

    def __init__(self):
        self.compiling = self.running = None
        self.runs_left = 0

    def __call__(self, graph, inputs):
        if self.compiling is not None:
            error, self.compiling = self.compiling, None
            raise error

        def run(*args):
            self.runs_left -= 1
            if self.running is not None and self.runs_left < 0:
                error, self.running = self.running, None
                raise error
            return graph.forward(*args)

        return run


def fresh(r=3):
    return flexclear.transform(tiny_flux(), r=r, backend="sdpa")


def run(model, height=HEIGHT, width=WIDTH):
    with torch.no_grad():
        return model(**flux_call(height, width, TEXT)).sample


def raising(error):
    def hook(module, args, output):
        raise error

    return hook


def state(model):
    """What a transformed model consists of beside its weights: hooks, processors, and names of attributes."""
    return [
        (
            name,
            [(key, hook) for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Hook)],
            [(key, hook) for key, hook in module._forward_hooks.items() if isinstance(hook, Hook)],
            getattr(module, "processor", None),
            sorted(vars(module)),
        )
        for name, module in model.named_modules()
    ]


def plans_alive():
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is CallPlan]


@functools.cache
def expected(height, width):
    return run(fresh(), height, width)


def assert_usable(model, before, sizes=((HEIGHT, WIDTH), (8, 17), (HEIGHT, WIDTH))):
    assert plans_alive() == []
    assert state(model) == before
    for height, width in sizes:
        assert torch.equal(run(model, height, width), expected(height, width))


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("where", ["transformer_blocks.1", "single_transformer_blocks.0.attn.to_q", "proj_out"])
def test_an_error_inside_a_call_leaves_the_model_usable(where, error):
    model = fresh()
    before, held = state(model), plans.stats().entries
    handle = model.get_submodule(where).register_forward_hook(raising(error("stop")))
    with pytest.raises(error):
        run(model)
    handle.remove()
    assert plans.stats().entries <= held + 1
    assert_usable(model, before)


@pytest.mark.parametrize(
    ("moment", "error"),
    [
        ("while compiling", KeyboardInterrupt),
        ("in the first block", torch.OutOfMemoryError),
        ("in a later block", KeyboardInterrupt),
    ],
)
def test_an_error_inside_a_compiled_call_leaves_the_model_usable(moment, error):
    torch.compiler.reset()
    model, backend = fresh(), Breakable()
    compile_blocks(model, backend=backend)
    before = state(model)
    if moment == "while compiling":
        backend.compiling = error("stop")
    else:
        backend.running, backend.runs_left = error("stop"), 0 if moment == "in the first block" else 3
    with pytest.raises((error, torch._dynamo.exc.BackendCompilerFailed)):
        run(model)
    assert backend.running is None
    assert backend.compiling is None
    assert_usable(model, before, [(HEIGHT, WIDTH)])
    torch.compiler.reset()


def test_an_error_while_a_plan_is_built_leaves_no_half_of_it(monkeypatch):
    model = fresh()
    before = state(model)
    plans.clear()
    with monkeypatch.context() as patch:
        patch.setattr("flexclear.runtime.plan.dense_mask", lambda *args, **kwargs: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            run(model)
    assert plans.stats().entries == 0
    assert_usable(model, before)


def test_an_interrupted_first_call_after_another_transform_does_not_bring_back_the_first_window():
    model = flexclear.transform(fresh(r=5), r=3, backend="sdpa")
    handle = model.norm_out.register_forward_hook(raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(model)
    handle.remove()
    assert_usable(model, state(model))


@torch.no_grad()
def test_a_call_after_an_interrupted_one_that_is_still_held_is_not_inside_it():
    model, other = (flexclear.transform(tiny_longcat(), r=r, backend="sdpa") for r in (2, 4))
    call = longcat_call(9, 13, 6)
    handle = model.proj_out.register_forward_hook(raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt) as held:
        model(**call)
    handle.remove()
    for one in (other, model):
        one(**call)
        with pytest.raises(ValueError, match="without its window"):
            one.forward(**call)
    assert held.value.__traceback__ is not None  # with all its frames and their arguments


@pytest.fixture(scope="module")
def pipe():
    pipe = flexclear.embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    flexclear.restore(pipe)


def picture(pipe, side=64, **kwargs):
    return pipe(
        "a red apple on a blue background",
        height=side,
        width=side,
        num_inference_steps=3,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **kwargs,
    ).images


def stopping(error):
    def callback(pipe, step, timestep, tensors):
        if step == 1:
            raise error
        return tensors

    return callback


@pytest.mark.parametrize(
    ("error", "compiled"), [(KeyboardInterrupt, False), (ValueError, False), (KeyboardInterrupt, True)]
)
def test_an_exception_in_a_step_callback_leaves_the_pipeline_usable(pipe, error, compiled):
    torch.compiler.reset()
    flexclear.transform(pipe, r=3, backend="sdpa", dense_steps=(1, 0))
    expected = picture(pipe)
    if compiled:
        compile_blocks(pipe.transformer, backend="eager")
    before = state(pipe.transformer)
    with pytest.raises(error):
        picture(pipe, callback_on_step_end=stopping(error("stop")))
    assert plans_alive() == []
    assert state(pipe.transformer) == before
    assert torch.equal(picture(pipe), expected)
    flexclear.compile.uncompile(pipe.transformer)
    torch.compiler.reset()


def test_out_of_memory_in_attention_says_how_large_the_call_was_and_what_takes_less(pipe, monkeypatch):
    flexclear.transform(pipe, r=3, backend="sdpa")
    expected = picture(pipe)

    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr("flexclear.runtime.call_plan.windowed_attention", exhausted)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught:
            picture(pipe)
    said = said_of(caught.value)
    for part in ("8 x 8 image tokens and 16 of text", "a smaller image", "enable_model_cpu_offload", "enable_tiling"):
        assert part in said
    assert "backend='flex'" in said  # masked SDPA was running
    del caught
    assert torch.equal(picture(pipe), expected)


def said_of(error):
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def test_a_host_out_of_memory_is_explained_too():
    model = fresh()
    handle = model.norm_out.register_forward_hook(lambda *_: torch.empty(1 << 46))
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        run(model)
    handle.remove()
    assert f"{HEIGHT} x {WIDTH} image tokens and {TEXT} of text" in said_of(caught.value)


def test_eight_bit_weights_are_advised_with_what_they_save_and_only_once():
    model = flexclear.transform(tiny_flux(attention_head_dim=128, axes_dims_rope=(32, 48, 48)), r=3, backend="sdpa")

    def said():
        handle = model.norm_out.register_forward_hook(raising(torch.OutOfMemoryError("no memory")))
        with pytest.raises(torch.OutOfMemoryError) as caught:
            run(model)
        handle.remove()
        return said_of(caught.value)

    promised = float(re.search(r"saves (\S+) MiB", said()).group(1))
    done = quantize(model, "weight_only")
    assert (done.bytes_before - done.bytes_after) / 2**20 == pytest.approx(promised, rel=0.02)
    assert "eight-bit weights" not in said()


def test_other_errors_are_left_as_they_are():
    model = fresh()
    handle = model.norm_out.register_forward_hook(raising(RuntimeError("something else")))
    with pytest.raises(RuntimeError) as caught:
        run(model)
    handle.remove()
    assert said_of(caught.value) == "something else"


def test_a_note_becomes_part_of_the_message_where_exceptions_take_none():
    class Old(RuntimeError):
        add_note = property(lambda self: (_ for _ in ()).throw(AttributeError))

    error = Old("no memory")
    note(error, "a smaller image")
    assert str(error) == "no memory\na smaller image"


def test_a_dense_mask_beyond_the_limit_says_what_fits(monkeypatch):
    plans.clear()
    monkeypatch.setattr("flexclear.runtime.plan.MAX_DENSE_BYTES", 100**2)
    model = fresh()
    with pytest.raises(ValueError, match=r"12 x 9 image tokens and 7 of text.*9 x 9 image tokens fit"):
        run(model)
    assert run(model, 9, 9).shape == (1, 81, 8)


def test_restoring_leaves_nothing_that_is_called_on_errors():
    model = flexclear.restore(fresh())
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called


def test_a_model_compiled_as_a_whole_survives_an_error():
    torch.compiler.reset()
    model, backend = fresh(), Breakable()
    compile_whole(model, backend=backend)
    before = state(model)
    backend.running = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        run(model)
    assert_usable(model, before, [(HEIGHT, WIDTH)])
    torch.compiler.reset()
