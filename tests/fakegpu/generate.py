"""Inductor's sources for a compiled function, generated from fake tensors and never run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flexclear.compile import compiled_flex_attention

from fakegpu.cases import Case

Call = Callable[[list[Any]], Any]


class NotGenerated(RuntimeError):
    """Inductor refuses; the message is the one that a user would read."""


class _Generated(Exception):
    """Raised in place of running what has been generated."""


@contextmanager
def graphs_to(handle: Callable[[str], Call]) -> Iterator[None]:
    """In place of importing the module that Inductor has generated, hand its source to ``handle``, which returns what is
    called. No caches, and the backward pass is generated with the forward pass."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    from torch._inductor.graph import GraphLowering

    def compile_to_module(graph: GraphLowering) -> SimpleNamespace:
        code, _ = graph.codegen()
        call = handle(code if isinstance(code, str) else code.value)
        return SimpleNamespace(
            call=call, __file__="/dev/null", __name__="generated", runner=None, recursively_apply_fns=None
        )

    names = [name for name in ("compile_to_module", "_compile_to_module") if hasattr(GraphLowering, name)]
    if not names:
        raise RuntimeError(f"fakegpu does not fit torch {torch.__version__}: GraphLowering has no compile_to_module")
    found = {name: getattr(GraphLowering, name) for name in names}
    inductor = {"compile_threads": 1, "fx_graph_cache": False, "force_disable_caches": True}
    functorch = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    torch.compiler.reset()
    try:
        for name in names:
            setattr(GraphLowering, name, compile_to_module)
        with inductor_config.patch(inductor), functorch_config.patch(functorch):
            yield
    finally:
        for name, function in found.items():
            setattr(GraphLowering, name, function)
        torch.compiler.reset()


def sources(function: Callable[[], Any]) -> list[str]:
    """What Inductor generates when ``function`` first calls something compiled on fake tensors.

    Raises:
        NotGenerated: it refuses.
    """
    found: list[str] = []

    def handle(source: str) -> Call:
        found.append(source)
        return stop

    def stop(args: list[Any]) -> Any:
        raise _Generated

    with graphs_to(handle):
        try:
            function()
        except _Generated:
            return found
        except Exception as error:
            raise NotGenerated(_first_lines(error)) from error
    raise RuntimeError("nothing was compiled")


def attention_sources(case: Case) -> list[str]:
    """Sources of flexclear's attention: one for inference; forward with log-sum-exp, then backward, for training.

    Raises:
        NotGenerated: flexclear or Inductor refuses.
    """
    return sources(attention_call(case, FakeTensorMode(allow_non_fake_inputs=True)))


def attention_call(case: Case, mode: FakeTensorMode) -> Callable[[], None]:
    """A call of flexclear's attention on fakes.

    Raises:
        NotGenerated: flexclear refuses.
    """
    if case.options.get("BACKEND") == "FLASH":
        believe_in_flash()
    try:
        mask = case.block_mask(functools.partial(fake, mode))
    except ValueError as error:
        raise NotGenerated(f"flexclear: {error}") from error
    queries, keys = mask.seq_lengths

    key_heads = case.key_heads or case.heads

    def projected(length: int, heads: int) -> Tensor:
        # As models hand them over: heads side by side in one row of memory.
        shape = (case.batch, length, heads, case.head_dim)
        row = torch.empty(shape, dtype=case.torch_dtype, device="cuda:0", requires_grad=case.backward)
        return row.transpose(1, 2)

    def call() -> None:
        with mode, torch.set_grad_enabled(case.backward):
            key, value = projected(keys, key_heads), projected(keys, key_heads)
            compiled_flex_attention(projected(queries, case.heads), key, value, mask)

    return call


@functools.cache
def believe_in_flash() -> None:
    """From now on, the package flash-attn-4 is taken to be there: without it, code is generated and not compiled."""
    import torch._inductor.kernel.flex.flex_flash_attention as flash

    import flexclear.compile.kernels as kernels

    for module, name in ((flash, "ensure_flash_available"), (kernels, "_has_flash")):
        if not hasattr(module, name):
            raise RuntimeError(f"fakegpu does not fit torch {torch.__version__}: {module.__name__} has no {name}")
        setattr(module, name, lambda: True)


def fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake on ``cuda:0`` of a CPU tensor's shape, strides and type, marked static where that is."""
    with mode:
        found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda:0")
    copy_marks(tensor, found)
    return found


def copy_marks(tensor: Tensor, other: Tensor) -> None:
    """Whatever Dynamo was told of one tensor's sizes, tell it of the other's."""
    for name, value in vars(tensor).items():
        if name.startswith("_dynamo_"):
            setattr(other, name, value)


def _first_lines(error: BaseException) -> str:
    """The message of the first cause, without Dynamo's advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " ".join(lines)[:400]
