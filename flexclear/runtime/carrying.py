"""How the plan of a call reaches every attention layer: on an argument that the model passes to all of its blocks anyway.

If the model takes a dictionary of arguments for its attention and passes it to every block, the plan is stored in it. Otherwise
the entry hook stores the plan in this thread, and ``CarrierHook`` attaches it to tensors that the model makes for every block
(its rotary embedding, or the embedding of the timestep). ``BlockHook`` reads the plan off a block's arguments when the block
begins, and the processor inside takes it from there. A block that gradient checkpointing runs again, in another thread and
after the call, therefore finds its own call's plan. Nothing about a call is kept on the model, and blocks that are called
without the entry hook find no plan.
"""

from __future__ import annotations

import inspect
import sys
import threading
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from flexclear.runtime.call_plan import CallPlan

CARRIED = "flexclear_plan"
"""Attribute of a tensor that carries a plan, and its key in a dictionary."""


class Hook:
    """Base of every hook that flexclear installs, by which ``flexclear.runtime.exchange`` finds them.

    Attributes:
        after: for a hook on a module inside the model: whether it runs after the module's forward instead of before.
    """

    after = False


here = threading.local()
"""This thread's state. Each entry is absent or None when it does not apply.

``entering``: plan of a call whose carriers have not all been made. ``plan``: plan of the block that is running or ran last.
``leaving``: plan of the running call, for its exit. Compiled graphs read these; they are written outside of graphs.
``model``: the running call's model. ``outer``: all of these of the call inside which it was made.
"""


def plan_here() -> CallPlan | None:
    """The plan of the block that this thread is running; None in a block without one."""
    return getattr(here, "plan", None)


def enter(model: nn.Module, plan: CallPlan, kwargs: dict[str, Any], argument: str | None) -> dict[str, Any]:
    """Give this thread the plan of a call, until its exit or until the returned arguments are garbage-collected.

    A hook inside a transformed model may call another one, or the same one again: the outer call's plan returns at the exit.

    Args:
        model: the model called.
        plan: the call's plan.
        kwargs: the call's arguments.
        argument: name of a dictionary among them that is passed to blocks, or None.
    """
    outer = _state()
    # After a KeyboardInterrupt, the call entered before may have ended without an exit.
    inside = outer.model is not None and _running(outer.model) > (outer.model is model)
    _put(_State(plan, None, plan, model, outer if inside else None))
    if argument is not None:
        kwargs = {**kwargs, argument: {**(kwargs.get(argument) or {}), CARRIED: plan}}
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            held = value.view_as(value)
            held.flexclear_call = _Call(model, plan)  # type: ignore[attr-defined]
            return {**kwargs, name: held}
    return kwargs


def leave(model: nn.Module, failed: bool = False) -> CallPlan | None:
    """End the call of ``model`` that this thread has entered, and return its plan, or None if it had none yet.

    Args:
        model: the model called.
        failed: whether an exception ends the call, perhaps before it was entered.
    """
    state = _state()
    if state.model is not model:
        return None
    if failed:
        entered = 0
        call: _State | None = state
        while call is not None:
            entered, call = entered + (call.model is model), call.outer
        if _running(model) > entered:
            return None  # The call that has a plan is another one, inside which this one was made.
    _put(state.outer or _State())
    return state.leaving


@dataclass(frozen=True)
class _State:
    """Values of ``here``."""

    entering: CallPlan | None = None
    plan: CallPlan | None = None
    leaving: CallPlan | None = None
    model: nn.Module | None = None
    outer: _State | None = None


def _state() -> _State:
    return _State(**vars(here))


def _put(state: _State) -> None:
    vars(here).update(vars(state))


def _running(model: nn.Module) -> int:
    """Number of calls of ``model`` that this thread is running."""
    count = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        count += frame.f_code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is model
        frame = frame.f_back
    return count


class _Call:
    """Ends a call when its arguments are garbage-collected: after a ``KeyboardInterrupt`` no exit hook runs."""

    def __init__(self, model: nn.Module, plan: CallPlan) -> None:
        self.model, self.plan = model, plan

    def __del__(self) -> None:
        if getattr(here, "leaving", None) is self.plan:
            leave(self.model)


class CarrierHook(Hook):
    """Forward hook of a module whose output every block gets: returns new views of it that carry the plan.

    It makes views because a model may cache the output and use it in other calls.

    Attributes:
        last: whether this is the last module of the model that carries the plan.
    """

    after = True

    def __init__(self, last: bool = True) -> None:
        self.last = last

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        plan: CallPlan | None = getattr(here, "entering", None)
        if plan is None:
            return output
        if self.last and not torch.compiler.is_compiling():
            here.entering = None
        return carrying(output, plan)


def carrying(value: Any, plan: CallPlan) -> Any:
    """``value`` with its tensors replaced by new views that carry the plan."""
    if isinstance(value, Tensor):
        view = value.view_as(value)
        setattr(view, CARRIED, plan)
        return view
    if isinstance(value, tuple | list):
        return type(value)([carrying(each, plan) for each in value])
    return value


def carried_by(values: Any) -> CallPlan | None:
    """The plan that one of these arguments carries, or None."""
    for value in values:
        if isinstance(value, Tensor):
            found = getattr(value, CARRIED, None)
        elif isinstance(value, dict):
            found = value.get(CARRIED)
        else:
            found = carried_by(value) if isinstance(value, tuple | list) else None
        if found is not None:
            return found
    return None


class BlockHook(Hook):
    """Forward pre-hook of a block with windowed attention: makes the plan that its arguments carry, or None, the thread's plan.

    The plan stays until the next block or the call's exit, as attention always runs in a block. If Dynamo traces the hooks, the
    plan reaches attention only through the block's arguments: once such a graph holds FlexAttention, Dynamo (torch 2.13)
    ignores earlier writes to an object.

    Attributes:
        argument: name of the block's argument that should carry the plan in that case, if attention gets none of those that
            carry it: a dictionary, or tensors that attention gets unchanged; or None.
        place: index of that argument among the positional ones.
    """

    def __init__(self, block: nn.Module, argument: str | None = None) -> None:
        self.argument = argument
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        self.place = names.index(argument) if argument is not None and argument in names else None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = carried_by((*args, *kwargs.values()))
        if not torch.compiler.is_compiling():
            here.plan = plan
            return None
        name, place = self.argument, self.place
        if plan is None or name is None or place is None:
            return None
        if place < len(args):
            return (*args[:place], _with(args[place], plan), *args[place + 1 :]), kwargs
        return args, {**kwargs, name: _with(kwargs.get(name), plan)}


def _with(value: Any, plan: CallPlan) -> Any:
    """An argument that carries the plan."""
    return {**(value or {}), CARRIED: plan} if value is None or isinstance(value, dict) else carrying(value, plan)
