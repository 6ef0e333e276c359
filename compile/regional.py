"""Compile a transformer's repeated blocks: one graph for equal blocks, never an unfused or partial one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from flexclear.compile.blocks import repeated_blocks
from flexclear.compile.report import remember_all_graphs

MODES = ("default", "max-autotune-no-cudagraphs", "max-autotune", "reduce-overhead")
"""``torch.compile``'s modes. The last two use CUDA graphs."""

GRAPHS_PER_SIZE = 2
"""Graphs that one kind of block may need for one size: the first of a stack gets contiguous tokens, the others a view."""


def check_mode(mode: str) -> str:
    """``mode`` if it is one of ``MODES``.

    Raises:
        ValueError: it is not.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
    return mode


def compile_blocks(
    model: nn.Module, *, mode: str = "default", dynamic: bool = False, max_sizes: int = 64, backend: str = "inductor"
) -> list[nn.Module]:
    """Compile every repeated block of ``model`` in place, ``fullgraph=True``; equal blocks share their graphs.

    Nothing is compiled yet when this returns: each size is compiled in its first call.

    Args:
        model: a transformer, transformed or not.
        mode: one of ``MODES``.
        dynamic: False: each size gets graphs of its own, the fastest ones. True: one set of graphs serves all sizes.
        max_sizes: sizes for which there is room; beyond, the call raises instead of running uncompiled.
        backend: ``torch.compile``'s; others than ``"inductor"`` are for debugging.

    Returns:
        The blocks.

    Raises:
        ValueError: an unknown mode, or a model without repeated blocks.
    """
    check_mode(mode)
    if isinstance(max_sizes, bool) or not isinstance(max_sizes, int) or max_sizes < 1:
        raise ValueError(f"max_sizes must be an int >= 1, got {max_sizes!r}")
    blocks = repeated_blocks(model)
    options = _room_for(GRAPHS_PER_SIZE * max_sizes)
    if backend == "inductor" and mode != "default":
        options["mode"] = mode
    remember_all_graphs()
    for block in blocks:
        block.compile(fullgraph=True, dynamic=dynamic, backend=backend, **options)
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
    options = _room_for(GRAPHS_PER_SIZE * max_sizes)
    if backend == "inductor" and mode != "default":
        options["mode"] = mode
    remember_all_graphs()
    model.compile(dynamic=dynamic, backend=backend, **options)
    return model


def uncompile(model: nn.Module) -> nn.Module:
    """Undo ``compile_blocks`` and ``compile_whole``: every module of ``model`` runs as Python again.

    Returns:
        ``model``.
    """
    for module in model.modules():
        module._compiled_call_impl = None
    return model


def _room_for(graphs: int) -> dict[str, Any]:
    """Dynamo's recompile limit for one ``torch.compile``; where torch has no such argument, the process's is raised."""
    config = torch._dynamo.config
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * graphs)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": graphs}
    config.recompile_limit = max(config.recompile_limit, graphs)
    return {}
