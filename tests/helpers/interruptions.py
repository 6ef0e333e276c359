"""An exception at the n-th line that an operation runs, for every n: it must leave either the old state or the new one."""

from __future__ import annotations

import contextlib
import pathlib
import sys

import torch

import flexclear
from flexclear.runtime.carrying import Hook

PACKAGE = [str(pathlib.Path(package.__file__).parent) for package in (flexclear, flexclear.compile, flexclear.masks)]
OTHERS = {
    torch.nn.modules.module.__file__: (
        "__setattr__",
        "remove_from",
        "register_forward_hook",
        "register_forward_pre_hook",
    ),
}
"""Where torch sets attributes and registers hooks: files and functions."""

OFTEN = 2
"""How many of the first rounds, and of the last rounds, of a line in a loop are interrupted."""


class Stop(KeyboardInterrupt):
    """Ctrl-C, distinguishable from a real one."""


class Lines:
    """Records each line that runs in flexclear and in torch code that sets attributes and registers hooks; raises at some.

    Args:
        stops: numbers of the lines to raise at, from 0, one after the other.
    """

    def __init__(self, *stops):
        self.seen, self.stops = [], list(stops)

    def _line(self, frame, event, argument):
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if self.stops and len(self.seen) > self.stops[0]:
                del self.stops[0]
                raise Stop(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self._line

    def __call__(self, frame, event, argument):
        code = frame.f_code
        ours = code.co_filename.startswith(tuple(PACKAGE)) or code.co_name in OTHERS.get(code.co_filename, ())
        return self._line if ours else None

    def run(self, action):
        """Run ``action``; returns whether it finished. It must not leave gradients off."""
        before, gradients = sys.gettrace(), torch.is_grad_enabled()
        sys.settrace(self)
        try:
            with contextlib.suppress(Stop):
                action()
                return True
            return False
        finally:
            sys.settrace(before)
            left, _ = torch.is_grad_enabled(), torch.set_grad_enabled(gradients)
            assert left == gradients, self.seen[-1]

    def points(self, *names):
        """Numbers of the lines to stop at: all lines, but only the first and last rounds of a long loop. If ``names`` are given,
        only lines of these files."""
        rounds = {}
        for number, place in enumerate(self.seen):
            if not names or pathlib.Path(place[0]).name in names:
                rounds.setdefault(place, []).append(number)
        return sorted({number for found in rounds.values() for number in (*found[:OFTEN], *found[-OFTEN:])})


def hooks_of(module):
    """Our hooks on a module, with the way each is called."""
    pre, after = module._forward_pre_hooks, module._forward_hooks
    return [
        *((hook, key in module._forward_pre_hooks_with_kwargs) for key, hook in pre.items() if isinstance(hook, Hook)),
        *(
            (hook, key in module._forward_hooks_with_kwargs, key in module._forward_hooks_always_called)
            for key, hook in after.items()
            if isinstance(hook, Hook)
        ),
        *((hook,) for hook in module._state_dict_pre_hooks.values() if isinstance(hook, Hook)),
    ]


def state_of(model):
    """Processors, hooks and parameters: the objects themselves."""
    return [
        (
            name,
            vars(module).get("processor"),
            list(module._modules),
            hooks_of(module),
            list(module._parameters.values()),
        )
        for name, module in model.named_modules()
    ]


def same(one, other):
    """Whether two states hold the same objects."""
    return _ids(one) == _ids(other)


def _ids(value):
    if isinstance(value, list | tuple):
        return tuple(map(_ids, value))
    return value if isinstance(value, str | bool) else id(value)


def outline_of(model):
    """What is equal for another model in the same state: types, slots, windows, and the originals' types."""
    return [
        (
            name,
            type(getattr(module, "processor", None)),
            getattr(getattr(module, "processor", None), "slot", None),
            type(getattr(getattr(module, "processor", None), "replaced", None)),
            [(type(hook), _said(hook), *flags) for hook, *flags in hooks_of(module)],
            [(key, value.shape) for key, value in module._parameters.items() if value is not None],
        )
        for name, module in model.named_modules()
    ]


def _said(hook):
    settings = getattr(hook, "settings", None)
    return (
        None
        if settings is None
        else (settings.windows, settings.slots, settings.order, getattr(hook, "parallel", None) is not None)
    )
