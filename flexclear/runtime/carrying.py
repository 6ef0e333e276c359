"""How the plan of a call reaches every attention layer: on an argument that the model gives to all of its blocks anyway.

Where the model takes a dictionary of arguments for its attention and gives that to every block, the plan is in there. Elsewhere
the entry hook hands it to this thread, and where the model makes what every block gets (its rotary embedding, or the
embedding of the timestep), ``CarrierHook`` makes those tensors carry it. ``BlockHook`` reads it off a block's arguments
when the block begins, so that a block that gradient checkpointing runs again, in another thread and after the call, finds
its own call's plan; and the processor inside takes it from there. Nothing of a call is kept on the model, and blocks that
are called without the entry find none.
"""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from flexclear.runtime.call_plan import CallPlan

CARRIED = "flexclear_plan"
"""Attribute of a tensor that carries a plan, and its key in a dictionary."""


class Hook:
    """Base of every hook that flexclear installs; ``flexclear.runtime.exchange`` finds them by it.

    Attributes:
        after: for a hook on a module inside the model: whether it runs after the module's forward instead of before.
    """

    after = False


here = threading.local()
"""This thread's state; each entry is absent or None outside of it.

``entering``: plan of a call whose carriers have not all been made; ``plan``: of the block that runs, or has run last;
``leaving``: plan of the call that runs, for its exit. Read in graphs, and written outside of them.
"""


def plan_here() -> CallPlan | None:
    """The plan of the block that this thread is running; None in a block without one."""
    return getattr(here, "plan", None)


def enter(plan: CallPlan, kwargs: dict[str, Any], argument: str | None) -> dict[str, Any]:
    """Give this thread the plan of a call until its exit, or until its arguments, which are returned, are gone.

    Args:
        plan: the call's.
        kwargs: its arguments.
        argument: name of a dictionary among them that blocks get, or None.
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
    """End the call that this thread has entered and return its plan; None if there was none yet."""
    plan: CallPlan | None = getattr(here, "leaving", None)
    here.entering = here.plan = here.leaving = None
    return plan


class _Call:
    """Kept among a call's arguments and gone with them: a ``KeyboardInterrupt`` runs no hook at the exit."""

    def __init__(self, plan: CallPlan) -> None:
        self.plan = plan

    def __del__(self) -> None:
        if getattr(here, "leaving", None) is self.plan:
            leave()


class CarrierHook(Hook):
    """Forward hook of a module whose output every block gets: returns new views of it, which carry the plan.

    Views, because a model may cache its output and use it in other calls.

    Attributes:
        last: whether no other module of the model carries the plan.
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
    """``value`` with new views of its tensors, which carry the plan."""
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
    """Forward pre-hook of a block with windowed attention: the plan that its arguments carry is the thread's, or none is.

    It stays until the next block, or the call's exit: attention is always in a block. In a graph that Dynamo traces, hooks
    included, the plan reaches attention in the block's arguments alone: once such a graph holds FlexAttention, Dynamo (torch
    2.13) reads what was written to an object before as if it had not been.

    Attributes:
        argument: name of the block's argument that is to carry it there, where attention gets none of those that do: a
            dictionary, or tensors that attention gets as they are; or None.
        place: its place among the positional ones.
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
