"""Which of diffusers' own modes go with windows, and what those that remember tokens must forget."""

from __future__ import annotations

from typing import Any

from torch import nn


def context_parallelism_of(model: nn.Module) -> Any:
    """diffusers' settings of it, or None."""
    return getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)


def refuse_context_parallelism(model: nn.Module) -> None:
    """Raise if every process of a group holds a part of the sequence.

    Raises:
        ValueError: it does.
    """
    config = context_parallelism_of(model)
    if config is not None:
        raise ValueError(
            f"this {type(model).__name__} has context parallelism (ring_degree={config.ring_degree}, "
            f"ulysses_degree={config.ulysses_degree}): each process sees a part of the picture, and windows are made for "
            "whole ones. Load the model without enable_parallelism, then transform"
        )


def refuse_frequency_caches(model: nn.Module, order: str) -> None:
    """Raise if a cache takes Fourier transforms over tokens that are not in raster order.

    Raises:
        ValueError: one does.
    """
    if order == "raster":
        return
    hooks: dict[str, Any] = getattr(getattr(model, "_diffusers_hook", None), "hooks", {})
    denoiser = hooks.get("faster_cache_denoiser")
    if denoiser is not None and not denoiser.is_guidance_distilled:
        name = "FasterCache without is_guidance_distilled=True"
    elif "sea_cache_root" in hooks:
        name = "SeaCache"
    else:
        return
    raise ValueError(
        f"{name} compares frequencies of the picture inside the model, where this transformed {type(model).__name__} has "
        f"its tokens in {order} order. flexclear.transform(model, ..., order='raster') keeps them as they are"
    )


def forget_cached_tokens(model: nn.Module) -> None:
    """Empty the caches of ``model.enable_cache``: they hold tokens in an order that no longer is the model's."""
    if getattr(model, "is_cache_enabled", False):
        model._reset_stateful_cache()  # type: ignore[operator]
