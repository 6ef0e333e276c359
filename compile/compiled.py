"""Replacements for the forward, or the call, of a compiled module."""

from __future__ import annotations

import threading
import types
from typing import Any

import torch
from torch import nn

from flexclear.compile.blocks import hook_inside, hook_on, repeated_blocks
from flexclear.compile.calls import Given, Size

GRAPHS_PER_SIZE = 2
"""Graphs that one kind of block may need per size: one, plus one for texts of at most one token."""

VARIANTS = 4
"""Factor for the variants of a graph: with and without gradients, padded text, dense steps, an adapter."""


class Room:
    """The sizes that a model has been compiled for, up to ``max_sizes``; None: no limit."""

    def __init__(self, model: str, max_sizes: int | None) -> None:
        self.model, self.max_sizes = model, max_sizes
        self._seen: set[Size] = set()
        self._lock = threading.Lock()

    def admit(self, size: Size | None) -> None:
        """Record a size, and raise if it is one too many.

        Raises:
            RuntimeError: it is.
        """
        if size is None or self.max_sizes is None or size in self._seen:
            return
        with self._lock:
            if len(self._seen) >= self.max_sizes and size not in self._seen:
                raise RuntimeError(
                    f"this {self.model} was compiled with max_sizes={self.max_sizes} and has met that many; tokens of "
                    f"{' x '.join(map(str, size))} (samples x image tokens) would be one more. Pass a larger max_sizes, or "
                    "dynamic=True for one set of graphs for all sizes, to flexclear.optimize or compile_blocks"
                )
            self._seen.add(size)

    def full(self, module: nn.Module) -> RuntimeError:
        """The error for a model for which Dynamo makes no more graphs."""
        return RuntimeError(
            f"Dynamo makes no more graphs for {type(module).__name__} of this {self.model}: there is room for "
            f"{GRAPHS_PER_SIZE * VARIANTS} of each size. flexclear.compile.report() names the cause of each. If these are "
            "sizes of several models, pass a larger max_sizes, or dynamic=True for one set of graphs for all sizes, to "
            "flexclear.optimize or compile_blocks"
        )


class CompiledForward:
    """A block's ``forward`` as a graph, stored as the instance's own ``forward``. Hooks of other libraries replace that
    attribute, so they find the graph there and run around it as Python. It cannot be removed from under such hooks, so the
    block's ``_compiled_call_impl`` says whether it is active.

    Copies and pickles of the block get the class's forward instead, as with ``nn.Module.compile``.
    """

    __slots__ = ("_compiled", "_module", "_room")

    def __init__(self, module: nn.Module, room: Room, **options: Any) -> None:
        self._module, self._room = module, room
        self._compiled: Any = torch.compile(self.__wrapped__, **options)

    @property
    def __wrapped__(self) -> Any:
        # inspect.signature reads this, too.
        return types.MethodType(type(self._module).forward, self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self._module._compiled_call_impl is None:
            return self.__wrapped__(*args, **kwargs)
        inside = hook_inside(self._module)
        if inside is not None:
            raise RuntimeError(
                f"{inside} of a compiled {type(self._module).__name__} of this {self._room.model}, which is one graph and "
                "cannot hold it. Offload by blocks (offload_type='block_level') or as a whole (enable_model_cpu_offload), "
                "which go around the graphs; or flexclear.compile.uncompile(model), or optimize(compile=False), to run it "
                "uncompiled"
            )
        given = Given(self._module, args, kwargs, dense=True)
        self._room.admit(given.size)
        given.mark()
        try:
            return self._compiled(*given.args, **given.kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise self._room.full(self._module) from error

    def __reduce__(self) -> tuple[Any, ...]:
        # On a copy, getattr runs while its own dictionary is still empty, and so finds the class's forward.
        return getattr, (self._module, "forward")


class CompiledModel:
    """Replaces the ``_compiled_call_impl`` that ``nn.Module.compile`` gives a whole model."""

    def __init__(self, module: nn.Module, room: Room) -> None:
        self._module, self._room = module, room
        self._compiled: Any = module._compiled_call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compiled(*args, **kwargs)
        given = Given(self._module, args, kwargs)
        self._room.admit(given.size)
        given.mark()
        try:
            return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise self._room.full(self._module) from error


def check_no_hooks(model: nn.Module) -> None:
    """Raise if another library has put hooks on or inside the repeated blocks of ``model``, or has replaced a block's forward:
    hooks cannot be compiled, and the replacement would be compiled instead of the class's forward.

    Raises:
        ValueError: one has.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for block in repeated_blocks(model):
        name = names[id(block)]
        found = hook_on(block, "the block") or hook_inside(block)
        if found is not None:
            raise ValueError(
                f"{found} of {name} of this {type(model).__name__} (by enable_group_offload, enable_sequential_cpu_offload, "
                "enable_cache, enable_layerwise_casting, a device_map or the like), and its blocks can only be compiled without. "
                "Compile first: flexclear.optimize(...), then offload or cache; or compile=False"
            )
        own: Any = vars(block).get("forward")
        # A removed hook leaves the forward that it had found, as an attribute of the instance.
        left = isinstance(own, CompiledForward) or getattr(own, "__func__", None) is type(block).forward
        if own is not None and not left:
            raise ValueError(
                f"{name} of this {type(model).__name__} was given a forward of its own ({own!r:.80}), but its class's is to be "
                f"compiled. Remove it with del model.{name}.forward, or pass compile=False"
            )
