"""The two hooks of a transformed model: tokens into tile order at its entry, back into raster order at its exit.

Nothing about a call is kept on the model. The plan travels in the call's own arguments, where the exit hook finds it
again, so calls of several sizes, threads and exceptions cannot mix.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexclear.attention import choose_backend
from flexclear.compile import why_not_compiled
from flexclear.families import Call, Family
from flexclear.grid import GridReader
from flexclear.masks import Layout, Window
from flexclear.masks.blocks import check_block_size
from flexclear.plan import Plan, get_plan


@dataclass(frozen=True)
class Settings:
    """How a model was transformed; see ``flexclear.transform`` for the meaning of each field."""

    window: Window
    backend: str
    order: str
    block_size: tuple[int, int] | None
    exact_position_ids: bool


class EntryHook:
    """Forward pre-hook: reads the grid off the call, gets the plan, permutes what has a token axis."""

    def __init__(self, family: Family, settings: Settings, processors: Mapping[str, Any]) -> None:
        self.family = family
        self.settings = settings
        self.processors = dict(processors)
        """The processors that were there before, by module name, for ``restore``."""
        self._grid = GridReader()

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict]:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        if len(args) > len(names):
            raise TypeError(f"{type(model).__name__} takes {len(names)} arguments, got {len(args)} positional ones")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        call = self.family.read(kwargs, self._grid)
        return (), self.family.enter(kwargs, self.plan(model, call), self.settings.exact_position_ids)

    def plan(self, model: nn.Module, call: Call) -> Plan:
        """The plan of one call."""
        device, dtype = call.tokens.device, call.tokens.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        needs_grad = torch.is_grad_enabled() and (
            call.tokens.requires_grad or any(p.requires_grad for p in model.parameters())
        )
        settings = self.settings
        backend = choose_backend(settings.backend, device, dtype, needs_grad)
        if backend == "sdpa" and settings.backend == "auto" and not needs_grad:
            self._say_why(device)
        layout = Layout(call.height, call.width, call.text_len, self.family.text_first, settings.order)
        block_size = check_block_size(settings.block_size, layout)
        return get_plan(layout, settings.window, backend, block_size, device, needs_grad and backend == "flex")

    @staticmethod
    def _say_why(device: torch.device) -> None:
        reason = why_not_compiled(device)
        if reason is not None:
            warnings.warn(
                f"flexclear: compiled FlexAttention cannot run here: {reason}. Masked SDPA runs instead: same results, "
                "no gain in time, and a dense mask",
                stacklevel=4,
            )


class ExitHook:
    """Forward hook: the model's output back in raster order."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.family.leave(output, self.family.plan_of(kwargs))


def entry_hook_of(model: nn.Module) -> EntryHook | None:
    """The entry hook of a transformed model, None on any other."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, EntryHook)), None)


def install(model: nn.Module, entry: EntryHook) -> None:
    """Add both hooks. The entry runs first of all hooks and the exit last, so that others see raster order."""
    model.register_forward_pre_hook(entry, with_kwargs=True)
    model.register_forward_hook(ExitHook(entry.family), with_kwargs=True)


def uninstall(model: nn.Module) -> None:
    """Remove both hooks; found by type, because a deep copy of a model has no handles of its own."""
    for hooks, flags, kind in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, EntryHook),
        (model._forward_hooks, model._forward_hooks_with_kwargs, ExitHook),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key]
            flags.pop(key, None)
