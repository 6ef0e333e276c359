"""Masked SDPA in 16 bits is not differentiated by cuDNN's kernel, unless no other is allowed."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexclear.masks import Disc, Layout, dense_mask
from flexclear.runtime import attention
from flexclear.runtime.attention import masked_sdpa, windowed_attention

KINDS = {
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
}
EVERY = set(KINDS)


def allowed():
    return {name for name, ask in KINDS.items() if ask()}


@pytest.fixture
def asked(monkeypatch):
    """What every call of SDPA may use; the calls compute nothing."""
    found = []

    def attend(query, key, value, **given):
        found.append(allowed())
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    return found


def call(device="cuda", dtype=torch.bfloat16, needs=(0,), attend=masked_sdpa, mask=True):
    """One call with tensors that hold nothing; the inputs numbered in ``needs`` have gradients."""
    with FakeTensorMode():
        tensors = [
            torch.empty(1, 2, 96, 64, device=device, dtype=dtype, requires_grad=number in needs) for number in range(3)
        ]
        attend(*tensors, torch.ones(96, 96, dtype=torch.bool, device=device) if mask else None)


@pytest.mark.parametrize("attend", [masked_sdpa, windowed_attention])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_differentiated_call_is_left_to_other_kernels(asked, attend, dtype, needs):
    assert allowed() == EVERY
    call(dtype=dtype, needs=needs, attend=attend)
    assert asked == [{"efficient", "math"}]
    assert allowed() == EVERY


@pytest.mark.parametrize(
    "given",
    [{"needs": ()}, {"dtype": torch.float32}, {"device": "cpu"}, {"attend": windowed_attention, "mask": False}],
    ids=["no gradients", "float32", "CPU", "no mask"],
)
def test_any_other_call_is_not_touched(asked, given):
    call(**given)
    assert asked == [EVERY]


def test_nor_is_a_call_without_gradients(asked):
    with torch.no_grad():
        call()
    assert asked == [EVERY]


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        ([SDPBackend.MATH], {"math"}),
        ([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION], {"efficient"}),
        ([SDPBackend.CUDNN_ATTENTION], {"cudnn"}),
    ],
    ids=["math", "efficient or cuDNN", "cuDNN alone"],
)
def test_what_the_caller_allows_holds(asked, chosen, left):
    with sdpa_kernel(chosen):
        before = allowed()
        call()
        assert allowed() == before
    assert asked == [left]
    assert allowed() == EVERY


def test_a_call_that_fails_leaves_everything_as_it_was(monkeypatch):
    def fail(*args, **given):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        call()
    assert allowed() == EVERY


def test_threads_that_train_at_once_take_turns(monkeypatch):
    """Else the second would begin with what the first has switched off, and leave it so."""
    inside, second_inside, first_done = (threading.Event() for _ in range(3))
    found = []

    def attend(query, key, value, **given):
        found.append(allowed())
        if not inside.is_set():
            inside.set()
            second_inside.wait(0.5)
        else:
            second_inside.set()
            first_done.wait(5)
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)

    def first():
        call()
        first_done.set()

    threads = [threading.Thread(target=first), threading.Thread(target=lambda: inside.wait() and call())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{"efficient", "math"}] * 2
    assert allowed() == EVERY


def test_float32_under_autocast_is_16_bits_too(asked, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    call(dtype=torch.float32)
    call(dtype=torch.float32, device="cpu")
    assert asked == [{"efficient", "math"}, EVERY]


def test_compiled_it_is_one_graph_with_the_same_gradients(monkeypatch):
    monkeypatch.setattr(attention, "_is_for_cudnn", lambda query: True)
    mask = dense_mask(Layout(6, 5, 3), Disc(2))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, len(mask), 64, generator=generator, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(masked_sdpa, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(attend(*tensors, mask).square().sum(), tensors) for attend in (compiled, masked_sdpa)]
    for ours, eager in zip(*found, strict=True):
        assert (ours - eager).abs().max() <= 1e-5 * eager.abs().max()
    assert allowed() == EVERY


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("text", [0, 32, 64, 128], ids="{} text tokens".format)
def test_on_a_gpu_gradients_are_finite_and_as_near_to_float32_as_the_type_allows(text, head_dim):
    """1024 image tokens: with 32 text tokens, this is what gave NaN and illegal reads in a distillation on an H100."""
    mask = dense_mask(Layout(32, 32, text), Disc(8), device="cuda")
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(8, 4, len(mask), head_dim, generator=generator).cuda() for _ in range(3)]
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [tensor.to(torch.bfloat16).to(dtype).requires_grad_() for tensor in tensors]
        out = masked_sdpa(*inputs, mask)
        found.append([one.float() for one in torch.autograd.grad(out.float().square().sum(), inputs)])
    for name, ours, exact in zip(("query", "key", "value"), *found, strict=True):
        assert ours.isfinite().all(), name
        # A few roundings of 2^-9 each: of the probabilities, the output, its gradient and the products.
        assert (ours - exact).norm() <= 4 * 2**-9 * exact.norm(), name
