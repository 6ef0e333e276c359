"""Compile a transformer's repeated blocks: one graph for equal blocks, never an unfused or partial one."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn

from flexclear.compile.blocks import repeated_blocks
from flexclear.compile.calls import Size, mark, ready, size_of
from flexclear.compile.flex import why_no_cpp_compiler
from flexclear.compile.report import remember_all_graphs

MODES = ("default", "max-autotune-no-cudagraphs", "max-autotune", "reduce-overhead")
"""``torch.compile``'s modes. The last two use CUDA graphs."""

GRAPHS_PER_SIZE = 2
"""Graphs that one kind of block may need for one size: one, and one more for texts of one token or none."""

VARIANTS = 4
"""By how many they may multiply: with and without gradients, padding in the text, dense steps, an adapter."""


def check_mode(mode: str) -> str:
    """``mode`` if it is one of ``MODES``.

    Raises:
        ValueError: it is not.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
    return mode


def check_max_sizes(max_sizes: int) -> int:
    """``max_sizes`` if it is an int from 1 on.

    Raises:
        ValueError: it is not.
    """
    if isinstance(max_sizes, bool) or not isinstance(max_sizes, int) or max_sizes < 1:
        raise ValueError(f"max_sizes must be an int >= 1, got {max_sizes!r}")
    return max_sizes


def compile_blocks(
    model: nn.Module, *, mode: str = "default", dynamic: bool = False, max_sizes: int = 64, backend: str = "inductor"
) -> list[nn.Module]:
    """Compile every repeated block of ``model`` in place, ``fullgraph=True``; equal blocks share their graphs.

    Nothing is compiled yet when this returns: each size is compiled in its first call. The number of text tokens is a
    symbol in the graphs, so that no prompt costs one; a text of one token or none is an exception.

    Args:
        model: a transformer, transformed or not.
        mode: one of ``MODES``.
        dynamic: False: each size gets graphs of its own, the fastest ones. True: one set of graphs serves all sizes.
        max_sizes: sizes for which there is room, batches of another length counted as sizes; beyond, the call raises
            RuntimeError instead of running uncompiled. Without a meaning where ``dynamic`` is True.
        backend: ``torch.compile``'s; others than ``"inductor"`` are for debugging.

    Returns:
        The blocks.

    Raises:
        ValueError: an unknown mode, a model without repeated blocks, or nothing that could compile on its device.
    """
    check_mode(mode)
    check_max_sizes(max_sizes)
    check_compiler(model, backend)
    blocks = repeated_blocks(model)
    room = _Room(type(model).__name__, None if dynamic else max_sizes)
    remember_all_graphs()
    for block in blocks:
        block.compile(fullgraph=True, dynamic=dynamic, backend=backend, **_options(mode, backend, max_sizes))
        block._compiled_call_impl = _CompiledBlock(block, room)
    return blocks


def compile_whole(
    model: nn.Module, *, mode: str = "default", dynamic: bool = False, max_sizes: int = 64, backend: str = "inductor"
) -> nn.Module:
    """Compile ``model`` as a whole, in place: one graph between entry and exit, which run outside of it.

    Takes longer to compile than ``compile_blocks`` by the number of blocks, and saves what happens between blocks.
    Arguments and errors as there.

    Returns:
        ``model``.
    """
    check_mode(mode)
    check_max_sizes(max_sizes)
    check_compiler(model, backend)
    remember_all_graphs()
    model.compile(dynamic=dynamic, backend=backend, **_options(mode, backend, max_sizes))
    model._compiled_call_impl = _CompiledModel(model, _Room(type(model).__name__, None if dynamic else max_sizes))
    return model


class _Room:
    """The sizes that a model has been compiled for, as many as there is room for; without limit where that is None."""

    def __init__(self, model: str, max_sizes: int | None) -> None:
        self.model, self.max_sizes = model, max_sizes
        self._seen: set[Size] = set()
        self._lock = threading.Lock()

    def admit(self, size: Size | None) -> None:
        """Raise if a size is one too many.

        Raises:
            RuntimeError: it is.
        """
        if size is None or self.max_sizes is None or size in self._seen:
            return
        with self._lock:
            if len(self._seen) >= self.max_sizes and size not in self._seen:
                raise RuntimeError(
                    f"this {self.model} was compiled with max_sizes={self.max_sizes} and has met as many; tokens of "
                    f"{' x '.join(map(str, size))} (samples x image tokens) would be one more. Give a larger max_sizes, or "
                    "dynamic=True for one set of graphs for all sizes, to flexclear.optimize or compile_blocks"
                )
            self._seen.add(size)

    def full(self, module: nn.Module) -> RuntimeError:
        """What to raise where Dynamo makes no more graphs."""
        return RuntimeError(
            f"Dynamo makes no more graphs for {type(module).__name__} of this {self.model}: there is room for "
            f"{GRAPHS_PER_SIZE * VARIANTS} of each size. flexclear.compile.report() names the cause of each. If these are "
            "sizes of several models, give a larger max_sizes, or dynamic=True for one set of graphs for all sizes, to "
            "flexclear.optimize or compile_blocks"
        )


class _CompiledBlock:
    """In the place of the ``_compiled_call_impl`` that ``nn.Module.compile`` has made."""

    def __init__(self, module: nn.Module, room: _Room) -> None:
        self._module, self._room = module, room
        self._compiled: Any = module._compiled_call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compiled(*args, **kwargs)
        self._room.admit(size_of(self._module, args, kwargs))
        args, kwargs = self._ready(args, kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise self._room.full(self._module) from error

    def _ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ready(self._module, args, kwargs)


class _CompiledModel(_CompiledBlock):
    """The same for a whole model, whose entry marks what a plan makes."""

    def _ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mark(self._module, args, kwargs)
        return args, kwargs


def uncompile(model: nn.Module) -> nn.Module:
    """Undo ``compile_blocks`` and ``compile_whole``: every module of ``model`` runs as Python again.

    Returns:
        ``model``.
    """
    for module in model.modules():
        module._compiled_call_impl = None
    return model


def check_compiler(model: nn.Module, backend: str) -> None:
    """Raise if Inductor has nothing to compile with where ``model`` is; it would say so in the first call.

    Raises:
        ValueError: it has not.
    """
    parameter = next(model.parameters(), None)
    if backend != "inductor" or parameter is None:
        return
    obstacle = None
    if parameter.device.type == "cpu":
        obstacle = why_no_cpp_compiler()
    elif parameter.device.type == "cuda" and not torch.utils._triton.has_triton():
        obstacle = "Triton is not installed, or does not know this GPU"
    if obstacle is not None:
        raise ValueError(f"torch.compile cannot run on {parameter.device}: {obstacle}. compile=False leaves it out")


def _options(mode: str, backend: str, max_sizes: int) -> dict[str, Any]:
    """Options of one ``torch.compile``: the mode, and room for graphs. Where torch has no argument for the recompile limit,
    the process's is raised."""
    graphs = GRAPHS_PER_SIZE * VARIANTS * max_sizes
    config = torch._dynamo.config
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * graphs)
    options: dict[str, Any] = {} if mode == "default" or backend != "inductor" else {"mode": mode}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {**options, "recompile_limit": graphs}
    config.recompile_limit = max(config.recompile_limit, graphs)
    return options
