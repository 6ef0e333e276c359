"""``optimize``: FP8 and compilation for a pipeline in production, in the one order that works."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from flexclear.compile import (
    WarmStart,
    compile_blocks,
    compile_whole,
    load_artifacts,
    quantize,
    report,
    runnable_recipes,
    uncompile,
)
from flexclear.compile import save_artifacts as compiled_artifacts
from flexclear.compile.compiled import check_no_hooks
from flexclear.compile.quantize import MIN_FEATURES, choose_linears, is_quantized, lora_layers, quantized_elsewhere
from flexclear.compile.recipes import RECIPES, check_recipe
from flexclear.compile.regional import check_compiler, check_max_sizes, check_mode
from flexclear.compile.undoing import undo
from flexclear.convert import transform_again
from flexclear.families import family_of
from flexclear.families.target import models_of
from flexclear.runtime.hooks import entry_hook_of
from flexclear.runtime.switches import in_force

Target = TypeVar("Target")
Size = tuple[int, ...]

logger = logging.getLogger("flexclear")

FUSED_PARTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""Projections of an attention layer that no longer run after ``fuse_qkv_projections``."""

WARM_UP_PROMPT = "a photograph of a landscape"
"""The prompt with which sizes are warmed up. It has several tokens, since texts of at most one token need separate graphs."""

MOST_STEPS = 64
"""Maximum number of steps tried until both of two transformers run."""

_CONFIGURATIONS: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()
"""The configuration each model was compiled for, as recorded in files of artifacts."""

REGIONS = ("blocks", "whole")
"""Names that ``compile=`` accepts: each repeated block, or the model as one graph."""


def optimize(
    model_or_pipe: Target,
    *,
    fp8: bool | str = False,
    device: torch.device | str | None = None,
    compile: bool | str = True,
    mode: str = "default",
    dynamic: bool = False,
    max_sizes: int = 64,
    fuse_qkv: bool = False,
    vae: bool = False,
    sizes: Sequence[Size] = (),
    warm_up: Callable[..., Any] | None = None,
    warm_start: str | Path | None = None,
    min_features: int = MIN_FEATURES,
    progress: bool = True,
    backend: str = "inductor",
) -> Target:
    """Make a pipeline fast, and keep it fast while it serves many sizes. In place.

    The passes have a fixed order: transform, weights, LoRA, then this function: fuse, quantize, compile, warm up. Sizes that were
    not warmed up compile in their first call, which is logged with its cost; attention never runs unfused. Some passes also work
    afterwards, at the price of compiling again: another transform, a LoRA that stays unfused, quantizing. After FP8, weights
    (``flexclear.load_weights``) are quantized as they are loaded, and fusing a LoRA raises.

    >>> flexclear.optimize(pipe, fp8=True, sizes=[(1024, 1024), (2048, 2048)])      # doctest: +SKIP

    Args:
        model_or_pipe: a pipeline, or its transformer. If a pipeline has several, all of them.
        fp8: True: FP8 products with one scale per row. Or a name from ``flexclear.compile.RECIPES``. False: no quantization.
        device: with ``fp8``, the device for a model that is on the CPU because its original weights do not fit on the GPU: it
            is moved there one linear at a time as it is quantized (``flexclear.compile.quantize``). The rest of a pipeline
            stays where it is: call ``pipe.to(device)`` or ``pipe.enable_model_cpu_offload()`` afterwards.
        compile: True or ``"blocks"``: each repeated block; identical blocks share their graphs. ``"whole"``: the model as one
            graph, which takes minutes instead of seconds to compile. False: do not compile.
        mode: ``torch.compile``'s mode, one of ``flexclear.compile.MODES``.
        dynamic: one set of graphs for all sizes instead of one per size.
        max_sizes: maximum number of sizes for which graphs are made; each batch size counts separately, prompts do not count.
            A call beyond that raises RuntimeError.
        fuse_qkv: fuse the query, key and value projections first (``fuse_qkv_projections``); diffusers also keeps the
            originals in memory. LoRA must be fused and unloaded first; loading one on these projections later
            makes calls raise, since it would have no effect.
        vae: compile the pipeline's VAE decoder as well.
        sizes: (height, width) in pixels to compile now, with a progress bar; for a video model, (frames, height, width).
        warm_up: a function of (height, width) that makes one image, or of (frames, height, width) that makes one video. By
            default the pipeline is called with a short prompt and as few steps as possible: one, or one more than
            ``dense_steps`` covers, or enough for both of two transformers to run. The graphs serve prompts of any length. Pass
            your own function for pipelines that need more than a prompt.
        warm_start: a file from ``flexclear.save_artifacts`` to load first; a stale or damaged one is logged and ignored.
        min_features: linears with fewer input or output features are not quantized.
        progress: whether to show a progress bar.
        backend: backend of ``torch.compile``; backends other than ``"inductor"`` are for debugging.

    Returns:
        ``model_or_pipe``.

    Raises:
        TypeError: neither a model nor a pipeline.
        ValueError: FP8 that this device does not support (the message names the device and the recipes it can run), an
            unknown mode or recipe, sizes without a pipeline, ``vae`` without a VAE, no compiler for this device, FP8 on a
            model that is already quantized (by any library), ``fuse_qkv`` with a LoRA or quantized weights or where
            diffusers fuses nothing, ``device`` without ``fp8`` or with ``sizes``. Nothing is changed then.
    """
    models = models_of(model_or_pipe)
    if compile not in (True, False, *REGIONS):
        raise ValueError(f"compile must be True, False or one of {list(REGIONS)}, got {compile!r}")
    check_mode(mode)
    check_max_sizes(max_sizes)
    target = None if device is None else torch.device(device)
    if target is not None and fp8 is False:
        raise ValueError(
            f"device={device!r} is where FP8 weights are made; without fp8, move the model: pipe.to({device!r})"
        )
    for model in models:
        if compile or vae:
            check_compiler(model, backend, target)
        if compile and compile != "whole":
            check_no_hooks(model)
    recipe = _recipe(fp8, target or next(models[0].parameters()).device)
    checked = [_size(size, family_of(models[0]).video) for size in sizes]
    if (checked or vae) and isinstance(model_or_pipe, nn.Module):
        raise ValueError("sizes and vae need the pipeline, not its transformer alone: flexclear.optimize(pipe, ...)")
    if vae and not isinstance(getattr(getattr(model_or_pipe, "vae", None), "decoder", None), nn.Module):
        found = type(getattr(model_or_pipe, "vae", None)).__name__
        raise ValueError(
            f"vae=True compiles the decoder of the pipeline's VAE, and this {type(model_or_pipe).__name__} has none (vae is a "
            f"{found}). Leave vae out"
        )
    if checked and target is not None:
        raise ValueError(
            f"sizes are warmed with the whole pipeline, and device={device!r} moves the transformer alone. Leave sizes out, move "
            "or offload the rest (pipe.enable_model_cpu_offload()), and call the pipeline once at each size"
        )
    for model in models:
        if fuse_qkv and not _fuses(model):
            raise ValueError(f"diffusers fuses no projections of a {type(model).__name__}; leave fuse_qkv out")
        if fuse_qkv:
            _check_fusable(model)
        if recipe is not None:
            choose_linears(model, recipe, min_features, device=target)

    configuration = artifact_configuration(models[0], recipe, mode, dynamic)
    if warm_start is not None:
        _say(load_artifacts(warm_start, configuration), warm_start)
    for model in models:
        if fuse_qkv:
            _fuse(model)
        if recipe is not None:
            logger.info("flexclear: %s", quantize(model, recipe, min_features=min_features, device=target))
        if compile:
            uncompile(model)
            region = compile_whole if compile == "whole" else compile_blocks
            region(model, mode=mode, dynamic=dynamic, max_sizes=max_sizes, backend=backend)
            _watch(model)
            _CONFIGURATIONS[model] = configuration
    if vae:
        model_or_pipe.vae.decoder.compile(dynamic=dynamic, backend=backend)  # type: ignore[attr-defined]
        _CONFIGURATIONS[models[0]] = configuration
    if checked:
        _warm(model_or_pipe, models, checked, warm_up, progress)
    return model_or_pipe


def save_artifacts(model_or_pipe: Any, path: str | Path) -> Path:
    """Write what was compiled for an optimized model or pipeline to a file, for the next process's ``optimize(warm_start=path)``.

    Call it after all sizes that matter have run. The file also holds everything else that this process has compiled.

    Args:
        model_or_pipe: the model or pipeline that ``optimize`` was given, with ``compile`` or ``vae`` on.
        path: the file; written under another name first.

    Returns:
        The path.

    Raises:
        TypeError: neither a model nor a pipeline.
        ValueError: it was not optimized in this process, or nothing has been compiled yet.
    """
    (model, *_) = models_of(model_or_pipe)
    if model not in _CONFIGURATIONS:
        raise ValueError(
            f"this {type(model).__name__} was not compiled by flexclear.optimize in this process: call flexclear.optimize(pipe), "
            "run the sizes that count, then save"
        )
    return compiled_artifacts(path, _CONFIGURATIONS[model])


def artifact_configuration(model: nn.Module, recipe: str | None, mode: str, dynamic: bool) -> dict[str, Any]:
    """What a model's compile artifacts depend on besides versions and device, for ``flexclear.compile.save_artifacts``."""
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    dtype = str(next(model.parameters()).dtype)
    return {
        "model": type(model).__name__,
        "config": config,
        "dtype": dtype,
        "recipe": recipe,
        "mode": mode,
        "dynamic": dynamic,
    }


def _recipe(fp8: bool | str, device: torch.device) -> str | None:
    if fp8 is False:
        return None
    if fp8 is True:
        able = [name for name in runnable_recipes(device) if RECIPES[name].multiplies_fp8]
        return check_recipe(able[0] if able else "rowwise", device)
    if not isinstance(fp8, str):
        raise ValueError(f"fp8 must be True, False or one of {list(RECIPES)}, got {fp8!r}")
    return check_recipe(fp8, device)


def _size(size: Any, video: bool) -> Size:
    if (
        not isinstance(size, tuple | list)
        or len(size) != 2 + video
        or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in size)
    ):
        wanted = (
            "(frames, height, width), frames of the video and pixels," if video else "(height, width) pairs in pixels,"
        )
        raise ValueError(f"sizes must be {wanted} got {size!r}")
    return tuple(size)


def _fuses(model: nn.Module) -> bool:
    """Whether ``fuse_qkv_projections`` fuses anything. diffusers' general one silently skips attention modules of its older
    class, as in Qwen-Image and HunyuanVideo."""
    fuse = getattr(type(model), "fuse_qkv_projections", None)
    general = getattr(fuse, "__module__", None) == "diffusers.models.attention"
    return fuse is not None and (
        not general or any(getattr(module, "_supports_qkv_fusion", False) for module in model.modules())
    )


def _check_fusable(model: nn.Module) -> None:
    wrapped = next(iter(lora_layers(model)), None)
    if wrapped is not None:
        raise ValueError(
            f"fuse_qkv with a LoRA on {wrapped}: fused projections would leave it out. pipe.fuse_lora() and "
            "pipe.unload_lora_weights() first, or leave fuse_qkv out"
        )
    if is_quantized(model):
        raise ValueError("fuse_qkv comes before FP8: eight-bit weights cannot be fused. Leave fuse_qkv out")
    foreign = quantized_elsewhere(model)
    if foreign is not None:
        raise ValueError(
            f"fuse_qkv concatenates weights, and this {type(model).__name__} has quantized ones ({foreign}). Leave fuse_qkv out"
        )


def _fuse(model: Any) -> None:
    # Registered first, so that an interruption never leaves fused projections without it; it ignores unfused ones.
    if not any(isinstance(hook, FusedProjectionsCheck) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(FusedProjectionsCheck())
    try:
        model.fuse_qkv_projections()
    except BaseException as error:
        undo(model.unfuse_qkv_projections)
        if isinstance(error, RuntimeError):  # LTX-2: attention between sound and video, of different widths
            raise ValueError(
                f"diffusers cannot fuse the projections of this {type(model).__name__}: {error}. Leave fuse_qkv out"
            ) from error
        raise
    if entry_hook_of(model) is not None:
        transform_again(model)


class FusedProjectionsCheck:
    """Forward pre-hook that raises for a LoRA on fused projections, where it would silently have no effect."""

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if not getattr(model, "peft_config", None):
            return
        for name in lora_layers(model):
            parent = model.get_submodule(name.rpartition(".")[0])
            if getattr(parent, "fused_projections", False) and name.rpartition(".")[2] in FUSED_PARTS:
                raise RuntimeError(
                    f"a LoRA was loaded on {name} after its projections were fused, and would have no effect. "
                    "Call pipe.unload_lora_weights(), then load and fuse the LoRA before fuse_qkv, or optimize without fuse_qkv"
                )


def _say(result: WarmStart, path: str | Path) -> None:
    if result.loaded:
        logger.info("flexclear: warm start from %s (%d libraries)", path, result.binaries)
    else:
        logger.warning("flexclear: no warm start, everything is compiled from scratch: %s", result.reason)


def _warm(
    pipe: Any, models: Sequence[nn.Module], sizes: Sequence[Size], warm_up: Callable[..., Any] | None, progress: bool
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    def by_default(*size: int) -> None:
        # After dense steps at either end, one more in between runs with the windows.
        entries = [entry for entry in map(entry_hook_of, models) if entry is not None]
        steps = max((1 + sum(in_force(entry.settings.switches).dense_steps) for entry in entries), default=1)
        frames = {"num_frames": size[0]} if len(size) == 3 else {}
        shown = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(**{**shown, "disable": True})
        checks = [RunCheck() for _ in models]
        handles = [
            model.register_forward_pre_hook(check, prepend=True)
            for model, check in zip(models, checks, strict=True)
            if len(models) > 1
        ]
        try:
            while True:
                pipe(prompt=WARM_UP_PROMPT, height=size[-2], width=size[-1], num_inference_steps=steps, **frames)
                if not handles or all(check.ran for check in checks):
                    return
                steps *= 2
                if steps > MOST_STEPS:
                    raise ValueError(
                        f"{steps // 2} steps of this {type(pipe).__name__} do not run each of its transformers with "
                        "its windows. Pass a warm_up that does"
                    )
        finally:
            for handle in handles:
                handle.remove()
            pipe.set_progress_bar_config(**shown)

    # Standard output is left to the program.
    with Progress(console=Console(stderr=True), disable=not progress, redirect_stdout=False) as bar:
        task = bar.add_task("compiling", total=len(sizes))
        for size in sizes:
            bar.update(task, description=f"compiling {' x '.join(map(str, size))}")
            (warm_up or by_default)(*size)
            bar.advance(task)


class RunCheck:
    """Forward pre-hook that notes when a model runs outside of the dense steps."""

    ran = False

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        entry = entry_hook_of(model)
        dense = entry is not None and entry.settings.steps.is_dense(in_force(entry.settings.switches).dense_steps)
        self.ran = self.ran or not dense


class CompileWatch:
    """Forward hook that logs what a call compiled, how long it took, and why."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen = len(report().graphs)
        self._since = time.monotonic()

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with self._lock:
            graphs = report().graphs
            new, self._seen = graphs[self._seen :], len(graphs)
        if new:
            tokens = kwargs.get("hidden_states", args[0] if args else None)
            shape = tuple(tokens.shape) if isinstance(tokens, torch.Tensor) else "a new size"
            logger.info(
                "flexclear: %s compiled %d graphs in %.1f s for tokens %s: %s",
                type(model).__name__,
                len(new),
                sum(graph.seconds for graph in new),
                shape,
                "; ".join(dict.fromkeys(graph.cause or f"first call of {graph.function}" for graph in new)),
            )

    def __deepcopy__(self, memo: dict[int, object]) -> CompileWatch:
        return CompileWatch()

    def __reduce__(self) -> tuple[type[CompileWatch], tuple[()]]:
        return CompileWatch, ()


def _watch(model: nn.Module) -> None:
    if not any(isinstance(hook, CompileWatch) for hook in model._forward_hooks.values()):
        model.register_forward_hook(CompileWatch(), with_kwargs=True)
