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
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexclear.compile.calls import CARRIED, carried_by

if TYPE_CHECKING:
    from flexclear.runtime.call_plan import CallPlan


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
"""


def plan_here() -> CallPlan | None:
    """The plan of the block that this thread is running; None in a block without one."""
    return getattr(here, "plan", None)


def enter(plan: CallPlan, kwargs: dict[str, Any], argument: str | None) -> dict[str, Any]:
    """Give this thread the plan of a call, until its exit or until the returned arguments are garbage-collected.

    Args:
        plan: the call's plan.
        kwargs: the call's arguments.
        argument: name of a dictionary among them that is passed to blocks, or None.
    """
    here.entering = here.leaving = plan
    if argument is not None:
        kwargs = {**kwargs, argument: {**(kwargs.get(argument) or {}), CARRIED: plan}}
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            held = value.view_as(value)
            held.flexclear_call = _Call(plan)  # type: ignore[attr-defined]
            return {**kwargs, name: held}
    return kwargs


def leave() -> CallPlan | None:
    """End the call that this thread has entered, and return its plan, or None if it had none yet."""
    plan: CallPlan | None = getattr(here, "leaving", None)
    here.entering = here.plan = here.leaving = None
    return plan


class _Call:
    """Ends a call when its arguments are garbage-collected: after a ``KeyboardInterrupt`` no exit hook runs."""

    def __init__(self, plan: CallPlan) -> None:
        self.plan = plan

    def __del__(self) -> None:
        if getattr(here, "leaving", None) is self.plan:
            leave()


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
