"""Compile a transformer's repeated blocks: identical blocks share one graph, which is never unfused or partial."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from flexclear.compile.blocks import repeated_blocks
from flexclear.compile.compiled import GRAPHS_PER_SIZE, VARIANTS, CompiledForward, CompiledModel, Room, check_no_hooks
from flexclear.compile.flex import why_no_cpp_compiler
from flexclear.compile.report import remember_all_graphs

MODES = ("default", "max-autotune-no-cudagraphs", "max-autotune", "reduce-overhead")
"""``torch.compile``'s modes. The last two use CUDA graphs."""


def check_mode(mode: str) -> str:
    """``mode`` if it is one of ``MODES``.

    Raises:
        ValueError: it is not.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
    return mode


def check_max_sizes(max_sizes: int) -> int:
    """``max_sizes`` if it is an int >= 1.

    Raises:
        ValueError: it is not.
    """
    if isinstance(max_sizes, bool) or not isinstance(max_sizes, int) or max_sizes < 1:
        raise ValueError(f"max_sizes must be an int >= 1, got {max_sizes!r}")
    return max_sizes


def compile_blocks(
    model: nn.Module, *, mode: str = "default", dynamic: bool = False, max_sizes: int = 64, backend: str = "inductor"
) -> list[nn.Module]:
    """Compile every repeated block of ``model`` in place with ``fullgraph=True``; identical blocks share their graphs.

    Nothing is compiled yet when this returns: each size is compiled in its first call. The number of text tokens is a
    symbol in the graphs, so one graph serves prompts of any length, except for texts of at most one token.

    Hooks that diffusers or accelerate put on a block later run as Python around its graph: block-level
    ``enable_group_offload``, first-block and magnitude caches, and hooks on the model as a whole. With a hook inside a block
    (leaf-level offloading, sequential offloading, layerwise casting, attention caches) its calls raise RuntimeError, since a
    single graph cannot contain it; call ``uncompile`` to run such a model.

    Args:
        model: a transformer, transformed or not.
        mode: one of ``MODES``.
        dynamic: False: each size gets its own graphs, the fastest ones. True: one set of graphs serves all sizes.
        max_sizes: maximum number of sizes, counting each batch size separately; a call beyond that raises
            RuntimeError instead of running uncompiled. No effect if ``dynamic`` is True.
        backend: backend of ``torch.compile``; backends other than ``"inductor"`` are for debugging.

    Returns:
        The blocks.

    Raises:
        ValueError: the mode is unknown, the model has no repeated blocks, blocks already have hooks, or there is no compiler for
            the model's device. Nothing is changed then.
    """
    check_mode(mode)
    check_max_sizes(max_sizes)
    check_compiler(model, backend)
    check_no_hooks(model)
    blocks = repeated_blocks(model)
    room = Room(type(model).__name__, None if dynamic else max_sizes)
    remember_all_graphs()
    options = _options(mode, backend, max_sizes, dynamic)
    for block in blocks:
        forward = CompiledForward(block, room, fullgraph=True, dynamic=dynamic, backend=backend, **options)
        block.forward = forward
        block._compiled_call_impl = block._call_impl
    return blocks


def compile_whole(
    model: nn.Module, *, mode: str = "default", dynamic: bool = False, max_sizes: int = 64, backend: str = "inductor"
) -> nn.Module:
    """Compile ``model`` as a whole, in place: one graph between entry and exit, which run outside of it.

    Compared with ``compile_blocks``, compile time is multiplied by the number of blocks, and the work between blocks is saved.
    Arguments and errors are the same.

    Returns:
        ``model``.
    """
    check_mode(mode)
    check_max_sizes(max_sizes)
    check_compiler(model, backend)
    remember_all_graphs()
    model.compile(dynamic=dynamic, backend=backend, **_options(mode, backend, max_sizes, dynamic))
    model._compiled_call_impl = CompiledModel(model, Room(type(model).__name__, None if dynamic else max_sizes))
    return model


def uncompile(model: nn.Module) -> nn.Module:
    """Undo ``compile_blocks`` and ``compile_whole``: every module of ``model`` runs as Python again.

    Returns:
        ``model``.
    """
    for module in model.modules():
        module._compiled_call_impl = None
        if isinstance(vars(module).get("forward"), CompiledForward):
            del module.forward
    return model


def check_compiler(model: nn.Module, backend: str, device: torch.device | None = None) -> None:
    """Raise if Inductor has no compiler for the device of ``model``, or for the ``device`` to which it will be moved; otherwise
    the first call would fail.

    Raises:
        ValueError: it has none.
    """
    parameter = next(model.parameters(), None)
    if backend != "inductor" or parameter is None:
        return
    obstacle, device = None, device or parameter.device
    if device.type == "cpu":
        obstacle = why_no_cpp_compiler()
    elif device.type == "cuda" and not torch.utils._triton.has_triton():
        obstacle = "Triton is not installed, or does not know this GPU"
    if obstacle is not None:
        raise ValueError(f"torch.compile cannot run on {device}: {obstacle}. Pass compile=False to do without")


def _options(mode: str, backend: str, max_sizes: int, dynamic: bool) -> dict[str, Any]:
    """Options for one ``torch.compile``: the mode, and room for graphs. If torch has no argument for the recompile limit, the
    process-wide limit is raised."""
    graphs = GRAPHS_PER_SIZE * VARIANTS * max_sizes
    config = torch._dynamo.config
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * graphs)
    options: dict[str, Any] = {"options": _inductor_options(mode, dynamic)} if backend == "inductor" else {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {**options, "recompile_limit": graphs}
    config.recompile_limit = max(config.recompile_limit, graphs)
    return options


def _inductor_options(mode: str, dynamic: bool) -> dict[str, Any]:
    """Inductor's options for a mode, without a pass that fails when the number of text tokens is a symbol.

    On GPUs that pass merges loops once they are fused (torch 2.13), and cannot split the merged ones again if it does not see
    that C * (text + image) is a multiple of text + image: FLUX's single blocks in row-wise FP8 or INT8 fail with CantSplit.
    """
    import torch._inductor.config

    options: dict[str, Any] = dict(torch._inductor.list_mode_options(mode, dynamic))
    if hasattr(torch._inductor.config, "loop_ordering_after_fusion"):
        options["loop_ordering_after_fusion"] = False
    return options
