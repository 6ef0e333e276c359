"""Compiled attention without Dynamo's wrapper, for calls known to use the same graph as one just before.

A function from ``torch.compile`` prepares to compile something in every call: it sets callbacks and configurations, and checks
some 200 guards. For attention in a small layer this takes most of the time. The guards check three kinds of facts:
the state of this thread and process (grad mode, autocast, inference mode, torch function modes, deterministic algorithms, ...);
types, dispatch keys, sizes, strides and offsets of the arguments; and the parts of the mask, down to the code of its
``mask_mod`` and of FlexAttention itself. As a rule, these are the same for all layers in one call of a model.

The first layer therefore goes through Dynamo, and ``Held`` keeps the compiled code whose guards it passed. That code serves the
other layers if their facts of the first two kinds, which are compared in every layer, are the same, and if their mask is the
same object with the same parts. The third kind is compared once per call of the model. Any other call goes through Dynamo.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

Attend = Callable[[Tensor, Tensor, Tensor, BlockMask, float | None], Tensor]


class _Internals:
    """The internals of torch that are used here, once Dynamo is loaded.

    Raises:
        ImportError, AttributeError: this torch keeps one of them elsewhere.
    """

    def __init__(self) -> None:
        from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, get_eval_frame_callback
        from torch._C._dynamo.guards import GlobalStateGuard
        from torch._dynamo import convert_frame, eval_frame
        from torch._guards import TracingContext
        from torch.fx import _symbolic_trace

        self.entries_of, self.callback = _debug_get_cache_entry_list, get_eval_frame_callback
        self.State, self.compile_lock, self.eval_frame = GlobalStateGuard, convert_frame.compile_lock, eval_frame
        self.tracing, self.symbolic_trace = TracingContext.try_get, _symbolic_trace
        self.outside_of_tracing()
        self.State().check()

    def outside_of_tracing(self) -> bool:
        """Whether nothing traces, captures or redirects what runs here, so that Dynamo's wrapper would only run existing code."""
        stance = self.eval_frame._stance
        return (
            self.callback() is None
            and stance.stance == "default"
            and getattr(stance, "backend", None) is None
            and not torch._C._is_tracing()
            and not self.symbolic_trace._is_fx_tracing_flag
            and not torch.compiler.is_exporting()
            and self.tracing() is None
            and torch._C._len_torch_function_stack() == 0
            and forward_ad._current_level < 0
        )


@functools.cache
def _internals() -> _Internals | None:
    """The internals of this torch, or None if it keeps them elsewhere; every call then goes through Dynamo."""
    try:
        return _Internals()
    except (ImportError, AttributeError):
        return None


def _facts_of(tensor: Tensor) -> tuple[Any, ...]:
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, keys


def _facts(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Any, ...]:
    """The facts about the arguments and this thread that guards check; ``GlobalStateGuard`` covers the rest."""
    return (
        scale,
        *_facts_of(query),
        *_facts_of(key),
        *_facts_of(value),
        torch._C._dispatch_tls_local_include_set().raw_repr(),
        torch._C._dispatch_tls_local_exclude_set().raw_repr(),
    )


def plain(tensor: Tensor) -> Tensor:
    """``tensor`` for a call without gradients, no longer recorded as a view of another one.

    Dynamo guards on the base of a view, and makes another graph if heads were split off in another way.
    """
    return tensor.data if type(tensor) is Tensor else tensor


@dataclass(frozen=True)
class _Passed:
    """Compiled code whose guards a call has passed, and the facts under which it did."""

    state: Any
    parts: tuple[Any, ...]
    attend: Attend


class Held:
    """Guards that calls of compiled attention have passed, for similar calls that follow immediately.

    An instance serves one call of a model, and is dropped afterwards.
    """

    def __init__(self) -> None:
        self._passed: dict[tuple[Any, ...], _Passed] = {}

    def find(self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Attend | None:
        """The compiled code for these ``plain`` arguments; None if it is not known."""
        if not self._passed:
            return None
        torch_has = _internals()
        if torch_has is None or not torch_has.outside_of_tracing():
            return None
        passed = self._passed.get(_facts(query, key, value, scale))
        if passed is None or not passed.state.check():
            return None
        parts = vars(mask).values()
        return (
            passed.attend if len(parts) == len(passed.parts) and all(map(operator.is_, parts, passed.parts)) else None
        )

    def learn(
        self, compiled: Any, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None
    ) -> None:
        """Keep the code that ``compiled``, from ``torch.compile``, has just run for these arguments, if it can be determined."""
        torch_has = _internals()
        if torch_has is None or any(type(tensor) is not Tensor for tensor in (query, key, value)):
            return
        if not torch_has.outside_of_tracing() or not torch_has.compile_lock.acquire(blocking=False):
            return  # Another thread is compiling, which takes minutes, or emptying Dynamo's caches.
        try:
            function = compiled._torchdynamo_orig_callable
            entries = [(each.guard_manager, each.code) for each in torch_has.entries_of(function.__code__)]
        except AttributeError:
            return
        finally:
            torch_has.compile_lock.release()
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        local = dict(zip(names, (query, key, value, mask, scale), strict=True))
        local.update(
            zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
        )
        for guards, code in entries:
            if code.co_freevars == function.__code__.co_freevars and guards.check(local):
                attend: Any = types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
                parts = tuple(vars(mask).values())
                self._passed[_facts(query, key, value, scale)] = _Passed(torch_has.State(), parts, attend)
                return
