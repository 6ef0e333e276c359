"""Derivatives that do not go through ``Tensor.backward``: forward-mode AD, and the transforms of ``torch.func``.

Compiled kernels support neither. Inductor reads a dual tensor's primal and silently drops its tangent, and Dynamo rejects
``torch.func`` levels that were entered outside the compiled region.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn


def has_tangent(tensors: Iterable[Tensor]) -> bool:
    """Whether one of these is a dual tensor of forward-mode AD."""
    # The level is process-wide, tangents are not: another thread's level must not cost this thread its kernels.
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
        if tensor.is_floating_point() or tensor.is_complex()
    )


def function_transforms() -> tuple[str, ...]:
    """The ``torch.func`` transforms active in this thread, outermost first, such as ``("jvp", "vmap")``."""
    stack = torch._C._functorch.get_interpreter_stack()
    return tuple(level.key().name.lower() for level in stack or ())


def transforms_in_force(tensors: Iterable[Tensor]) -> str | None:
    """Name the transforms that a computation over these tensors runs under besides reverse-mode autograd; None: none."""
    levels = function_transforms()
    if levels:
        return f"torch.func ({', '.join(levels)})"
    return "forward-mode AD" if has_tangent(tensors) else None


def needs_composite(tensors: Iterable[Tensor]) -> bool:
    """Whether a derivative is needed that fused attention kernels lack: they have only a reverse-mode one."""
    levels = function_transforms()
    return levels not in ((), ("grad",)) or has_tangent(tensors)


def refuse_over_compiled(model: nn.Module, transforms: str) -> None:
    """Raise if ``model`` has compiled modules, which ignore these transforms.

    Raises:
        RuntimeError: it has.
    """
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise RuntimeError(
            f"{transforms} does not reach through the compiled modules of this {type(model).__name__}, which ignore it. "
            "Call flexclear.compile.uncompile(model) first"
        )


def tensors_of(model: nn.Module) -> Iterable[Tensor]:
    """Parameters and buffers."""
    return itertools.chain(model.parameters(), model.buffers())
