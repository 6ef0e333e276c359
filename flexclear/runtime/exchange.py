"""Replaces a model's attention processors and flexclear's hooks in one step: all of them or none.

Each windowed processor knows the one that it replaces, so the original cannot be lost with a hook. Processors are replaced
first and hooks last. Any exception in between, including a ``KeyboardInterrupt`` between any two lines, restores the previous
state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from flexclear.compile.undoing import afterwards, undo
from flexclear.runtime.carrying import Hook
from flexclear.runtime.hooks import EntryHook, ExitHook
from flexclear.runtime.modes import forget_cached_tokens
from flexclear.runtime.processors import is_ours
from flexclear.runtime.saving import SaveHook


def put_processor(attention: Any, processor: Any) -> None:
    """Set an attention module's processor. Unlike diffusers' ``set_processor``, this also works if an interrupted call has left
    the module without one."""
    if not isinstance(processor, nn.Module):
        attention._modules.pop("processor", None)
    attention.processor = processor


def replaced_by(attention: Any) -> Any | None:
    """The processor to restore on an attention module that has one of ours, or None if it is not known."""
    known = attention.processor.replaced
    if known is not None:
        return known
    # load_ip_adapter makes new processors, without arguments, of the classes that it finds, including ours.
    default = getattr(type(attention), "_default_processor_cls", None)
    return None if default is None else default()


def put_hooks(model: nn.Module, entry: EntryHook) -> None:
    """Replace our hooks on a model: at its entry, at its exit, on its ``state_dict``, and the family's on inner modules."""
    remove_hooks(model)
    inner = entry.family.hooks(model, entry.settings.windows)
    session = entry.parallel
    if session is not None:
        inner = [*inner, *entry.family.parallel_hooks(model, lambda: session.current)]
    for module, hook in inner:
        if hook.after:
            module.register_forward_hook(hook, with_kwargs=True)
        else:
            module.register_forward_pre_hook(hook, with_kwargs=True)
    model.register_state_dict_pre_hook(SaveHook(entry.settings))
    # In front of the caller's own forward hooks, which would otherwise get the output in the model's token order.
    model.register_forward_hook(ExitHook(entry.family), prepend=True, with_kwargs=True, always_call=True)
    model.register_forward_pre_hook(entry, with_kwargs=True)


def remove_hooks(model: nn.Module) -> None:
    """Remove all of our hooks. They are found by type, because a deep copy of a model has no handles for its hooks."""
    for module in model.modules():
        for hooks, *flags in _hooks_of(module):
            for key in _ours(hooks):
                for flag in flags:
                    flag.pop(key, None)
                del hooks[key]


def _hooks_of(module: Any) -> tuple[tuple[dict[int, Any], ...], ...]:
    """Each ordered dictionary of hooks, with the dictionaries of flags that say how they are called."""
    return (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        (module._state_dict_pre_hooks,),
    )


def _ours(hooks: dict[int, Any]) -> list[int]:
    return [key for key, hook in hooks.items() if isinstance(hook, Hook)]


class Snapshot:
    """The processors of a model and our hooks on it, to be restored exactly: the same objects, hooks in the same order."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._processors = [(module, module.processor) for module in model.modules() if hasattr(module, "processor")]
        self._hooks: list[tuple[Any, list[tuple[int, Any]]]] = []
        for module in model.modules():
            for hooks, *flags in _hooks_of(module):
                if _ours(hooks):
                    self._hooks += [(each, list(each.items())) for each in (hooks, *flags)]

    def put_back(self) -> None:
        """Restore them; if interrupted, start again from the beginning."""
        undo(self._put_back)

    def _put_back(self) -> None:
        for module, processor in self._processors:
            put_processor(module, processor)
        remove_hooks(self._model)
        for hooks, items in self._hooks:
            for key, hook in items:
                hooks[key] = hook
                hooks.move_to_end(key)
        forget_cached_tokens(self._model)


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo changes to processors and our hooks inside a ``with`` block if anything is raised in it."""
    before = Snapshot(model)
    try:
        yield
    except BaseException:
        before.put_back()
        raise


@contextlib.contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Restore processors and our hooks after a ``with`` block."""
    with afterwards(Snapshot(model).put_back):
        yield


def put_originals(model: nn.Module) -> list[str]:
    """Restore the original of each of our processors, and return the names of modules whose original is not known."""
    left = []
    for name, module in list(model.named_modules()):
        if is_ours(getattr(module, "processor", None)):
            original = replaced_by(module)
            if original is None:
                left.append(name)
            else:
                put_processor(module, original)
    return left
