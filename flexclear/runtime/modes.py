"""Which of diffusers' own modes work with windows, and what those that cache tokens must drop.

A mode reaches into a model in one of three ways. Some read tokens by their place in the sequence: the model then needs raster
order, and any other order is refused. Some intercept SDPA: ``scores_skipped`` tells layers that do not call SDPA. Some look up
a processor's class: ``known_to_hooks`` registers ours alongside diffusers' own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

NO_EXPORT = (
    "a model under flexclear.transform cannot be exported or traced: its window is made from each call's grid, outside of any "
    "graph. To export the dense model, call flexclear.restore(model) first. To start a server without compiling, save what "
    "flexclear.optimize has compiled with flexclear.save_artifacts(pipe, path), and pass optimize(warm_start=path)"
)


def refuse_export() -> None:
    """Raise inside torch.export (torch.onnx, AOTInductor) and torch.jit.trace. In export's strict mode Dynamo stops at the hook
    before this runs, and gives ``NO_EXPORT`` as its reason.

    Raises:
        RuntimeError: the model is being exported or traced.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise RuntimeError(NO_EXPORT)


def context_parallelism_of(model: nn.Module) -> Any:
    """diffusers' configuration of context parallelism, or None."""
    return getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)


def refuse_context_parallelism(model: nn.Module) -> None:
    """Raise if diffusers' context parallelism gives each process of a group a part of the sequence.

    Raises:
        ValueError: it does.
    """
    config = context_parallelism_of(model)
    if config is not None:
        raise ValueError(
            f"this {type(model).__name__} has context parallelism (ring_degree={config.ring_degree}, "
            f"ulysses_degree={config.ulysses_degree}): each process sees a part of the image, and windows are made for "
            "whole ones. Load the model without enable_parallelism, then transform"
        )


def refuse_raster_readers(model: nn.Module, layers: Iterable[nn.Module], order: str, shared: bool) -> None:
    """Raise if a mode assumes that the tokens inside the model are an image in raster order, and they are not.

    Args:
        model: the transformed model.
        layers: its attention layers.
        order: order of the call's tokens.
        shared: whether each of several ranks has a part of the image.

    Raises:
        ValueError: one does.
    """
    if order == "raster" and not shared:
        return
    hooks: dict[str, Any] = getattr(getattr(model, "_diffusers_hook", None), "hooks", {})
    denoiser = hooks.get("faster_cache_denoiser")
    if denoiser is not None and not denoiser.is_guidance_distilled:
        name = "FasterCache without is_guidance_distilled=True compares frequencies"
    elif "sea_cache_root" in hooks:
        name = "SeaCache compares frequencies"
    elif _smooths_queries(layers):
        name = "Smoothed Energy Guidance blurs a square"
    else:
        return
    if shared:
        raise ValueError(f"{name} of the image inside the model, of which each of several ranks has a part")
    raise ValueError(
        f"{name} of the image inside the model, where this transformed {type(model).__name__} has its tokens in {order} "
        "order. flexclear.transform(model, ..., order='raster') keeps them as they are"
    )


def _smooths_queries(layers: Iterable[nn.Module]) -> bool:
    """Whether diffusers' Smoothed Energy Guidance has a hook on a projection of one of these layers."""
    for layer in layers:
        for part in layer._modules.values():
            # Hundreds of these in every call, so nn.Module's slow attribute look-up is bypassed.
            if part is not None and ("_diffusers_hook" in part.__dict__ or "_orig_mod" in part._modules):
                hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).values()
                if any(base.__name__ == "SmoothedEnergyGuidanceHook" for hook in hooks for base in type(hook).__mro__):
                    return True
    return False


def scores_skipped() -> bool:
    """Whether a diffusers hook (``LayerSkipConfig(skip_attention_scores=True)``, of perturbed-attention guidance) wants the
    running layer to return its values unmixed. The hook intercepts SDPA, which windowed layers may not call."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in modes)


def known_to_hooks(ours: type, theirs: type) -> None:
    """Register our processor's class with diffusers' hooks, so that they treat it like the original class."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        metadata = AttentionProcessorRegistry.get(theirs)
    except ValueError:
        return  # They do not know the original class either.
    AttentionProcessorRegistry.register(ours, metadata)


def forget_cached_tokens(model: nn.Module) -> None:
    """Empty the caches of ``model.enable_cache``: their token order is no longer the model's."""
    if getattr(model, "is_cache_enabled", False):
        model._reset_stateful_cache()  # type: ignore[operator]
