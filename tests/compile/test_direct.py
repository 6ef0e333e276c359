"""Layers of one call share what Dynamo's guards were asked, and nothing that differs passes for what was known."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import flexclear
from flexclear.compile import UnfusedAttentionError, compiled_flex_attention, direct, flex, why_not_compiled
from flexclear.compile.direct import Held
from flexclear.masks import Disc, Layout, block_mask

from helpers.models import flux_call, tiny_flux

pytestmark = pytest.mark.skipif(
    why_not_compiled(torch.device("cpu")) is not None, reason=str(why_not_compiled(torch.device("cpu")))
)

LAYOUT = Layout(14, 12, text_len=9)
HEADS, HEAD_DIM = 2, 64


@pytest.fixture(scope="module")
def mask():
    return block_mask(LAYOUT, Disc(4))


def heads(seed=0, count=HEADS, length=LAYOUT.seq_len, dtype=torch.float32):
    """Query, key and value as processors hand them on: views of ``[B, N, heads, head_dim]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, length, count, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]


def shifted(tensor):
    """The same values and strides, which begin elsewhere in their memory."""
    return torch.cat([tensor.transpose(1, 2), tensor.transpose(1, 2)])[1:].transpose(1, 2)


@pytest.fixture
def through_dynamo(monkeypatch):
    """Counts the calls of what torch.compile returned."""
    calls = []
    compiled = flex._compiled

    def counted(*facts):
        attend = compiled(*facts)

        def call(*args):
            calls.append(args)
            return attend(*args)

        call._torchdynamo_orig_callable = attend._torchdynamo_orig_callable
        return call

    monkeypatch.setattr(flex, "_compiled", counted)
    return calls


def plain(tensors):
    return [direct.plain(each) for each in tensors]


@pytest.fixture
def held(mask):
    """What a call under ``torch.no_grad()`` has left."""
    held = Held()
    with torch.no_grad():
        compiled_flex_attention(*heads(), mask, held=held)
        assert held.find(*plain(heads(1)), mask, None) is not None
    return held


@torch.no_grad()
def test_a_call_of_a_model_goes_through_dynamo_once_and_gives_the_same_bits(through_dynamo, monkeypatch):
    model = flexclear.transform(tiny_flux(attention_head_dim=64, axes_dims_rope=(16, 24, 24)), r=4, backend="flex")
    call = flux_call(14, 12, 9)
    model(**call)  # compiles
    through_dynamo.clear()
    ours = model(**call).sample
    assert len(through_dynamo) == 1
    monkeypatch.setattr(Held, "find", lambda *args: None)
    through_dynamo.clear()
    assert torch.equal(model(**call).sample, ours)
    assert len(through_dynamo) == 4


@torch.no_grad()
def test_the_next_call_asks_dynamo_again(through_dynamo):
    model = flexclear.transform(tiny_flux(attention_head_dim=64, axes_dims_rope=(16, 24, 24)), r=4, backend="flex")
    before = model(**flux_call(14, 12, 9)).sample
    model(**flux_call(12, 10, 9))
    torch.compiler.reset()
    through_dynamo.clear()
    assert torch.equal(model(**flux_call(14, 12, 9)).sample, before)
    assert len(through_dynamo) == 1


@pytest.mark.kept
@torch.no_grad()
def test_heads_that_were_split_off_in_another_way_are_no_graph_of_their_own(mask):
    torch.compiler.reset()
    query, key, value = heads()
    compiled_flex_attention(query, key, value, mask)
    before = flexclear.compile.report()
    assert query._base is not None
    whole = [each.transpose(1, 2).flatten(2).clone() for each in (query, key, value)]
    again = [each.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for each in whole]
    assert torch.equal(compiled_flex_attention(*again, mask), compiled_flex_attention(query, key, value, mask))
    assert flexclear.compile.report().since(before).graphs == ()


OTHERS = {
    "length": lambda: heads(length=LAYOUT.seq_len - 1),
    "heads": lambda: heads(count=4),
    "dtype": lambda: heads(dtype=torch.bfloat16),
    "dtype of one": lambda: [*heads()[:2], heads(dtype=torch.bfloat16)[2]],
    "strides": lambda: [each.contiguous() for each in heads()],
    "strides of one": lambda: [*heads()[:2], heads()[2].contiguous()],
    "beginning": lambda: [*heads()[:2], shifted(heads()[2])],
    "negative bit": lambda: [torch._neg_view(heads()[0]), *heads()[1:]],
    "meta device": lambda: [each.to("meta") for each in heads()],
}


@pytest.mark.parametrize("what", OTHERS)
@torch.no_grad()
def test_other_arguments_are_not_known(what, held, mask):
    assert held.find(*plain(OTHERS[what]()), mask, None) is None
    assert held.find(*plain(heads()), mask, None) is not None


@torch.no_grad()
def test_another_scale_or_mask_or_part_of_a_mask_is_not_known(held, mask):
    tensors = plain(heads())
    assert held.find(*tensors, mask, 0.5) is None
    assert held.find(*tensors, block_mask(LAYOUT, Disc(4)), None) is None
    changed = copy.copy(mask)
    assert held.find(*tensors, changed, None) is not None
    changed.kv_indices = changed.kv_indices.clone()
    assert held.find(*tensors, changed, None) is None
    marked = copy.copy(mask)
    marked.kernel_options = ()
    assert held.find(*tensors, marked, None) is None


def _default(name, value):
    @contextlib.contextmanager
    def changed():
        getter = {"set_default_dtype": torch.get_default_dtype, "set_num_threads": torch.get_num_threads}[name]
        before = getter()
        getattr(torch, name)(value)
        try:
            yield
        finally:
            getattr(torch, name)(before)

    return changed


@contextlib.contextmanager
def _deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


STATES = {
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another default dtype": _default("set_default_dtype", torch.float64),
    "deterministic algorithms": _deterministic,
    "a device": lambda: torch.device("meta"),
    "another stance": lambda: torch.compiler.set_stance("force_eager"),
    "dual numbers": forward_ad.dual_level,
}


@pytest.mark.parametrize("what", STATES)
def test_nothing_is_known_in_another_state(what, held, mask):
    tensors = plain(heads())
    with torch.no_grad(), STATES[what]():
        assert held.find(*tensors, mask, None) is None
    with torch.no_grad():
        assert held.find(*tensors, mask, None) is not None


@torch.no_grad()
def test_nothing_is_known_while_something_traces(held, mask):
    tensors = plain(heads())
    found = []

    def function(query):
        found.append(held.find(*tensors, mask, None))
        return query + 1

    torch.jit.trace(function, tensors[0], check_trace=False)
    torch.fx.symbolic_trace(function)
    assert len(found) > 1
    assert not any(each is not None for each in found)


@torch.no_grad()
def test_nothing_is_known_in_a_frame_that_dynamo_watches(held, mask):
    tensors = plain(heads())

    def look():
        return direct._internals().callback(), held.find(*tensors, mask, None)

    assert torch._dynamo.run(look)() == (False, None)


@torch.no_grad()
def test_under_force_eager_a_known_call_is_refused_like_any_other(held, mask):
    with torch.compiler.set_stance("force_eager"), pytest.raises(UnfusedAttentionError):
        compiled_flex_attention(*heads(), mask, held=held)


def test_another_thread_has_its_own_state(held, mask):
    found = []
    with torch.no_grad():
        tensors = plain(heads())

    def look():  # gradients are enabled in a new thread
        found.append(held.find(*tensors, mask, None))
        with torch.no_grad():
            found.append(held.find(*tensors, mask, None))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found[0] is None
    assert found[1] is not None


@torch.no_grad()
def test_a_torch_that_keeps_its_code_elsewhere_takes_dynamos_road(mask, monkeypatch, through_dynamo):
    monkeypatch.setattr(direct, "_internals", lambda: None)
    held = Held()
    first = compiled_flex_attention(*heads(), mask, held=held)
    assert torch.equal(compiled_flex_attention(*heads(), mask, held=held), first)
    assert len(through_dynamo) == 2


@torch.no_grad()
def test_while_another_thread_compiles_nothing_is_learnt_and_nobody_waits(mask):
    held = Held()
    compiled_flex_attention(*heads(), mask)
    ready, done = threading.Event(), threading.Event()

    def compiling():
        with direct._internals().compile_lock:
            ready.set()
            done.wait()

    thread = threading.Thread(target=compiling)
    thread.start()
    ready.wait()
    try:
        compiled_flex_attention(*heads(), mask, held=held)
    finally:
        done.set()
        thread.join()
    assert held.find(*plain(heads()), mask, None) is None
