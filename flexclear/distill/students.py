"""Which parameters train, and a teacher that shares the frozen ones with the student."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from flexclear.common.extras import require
from flexclear.convert import restore
from flexclear.families import family_of
from flexclear.runtime.processors import WindowProcessor
from flexclear.weights import keys

ADAPTER = "flexclear"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Attention projections, and the windowed processors' own parameters (pooling weights), by name.

    Raises:
        TypeError: the model is not supported.
        ValueError: they are fused, quantized or offloaded; see ``flexclear.weights.keys.projections``.
    """
    layers = list(family_of(model).layers(model))
    found = keys.projections(model, layers)
    for layer in layers:
        processor = layer.module.processor
        if isinstance(processor, WindowProcessor) and isinstance(processor, nn.Module):
            if isinstance(processor.replaced, nn.Module):
                raise ValueError(f"{layer.name} has an IP-Adapter. Call pipe.unload_ip_adapter() before training")
            for name, parameter in processor.named_parameters():
                found[f"{layer.name}.processor.{name}"] = parameter
    return found


def make_teacher(model: nn.Module, trained: Iterable[nn.Parameter] | None = None) -> nn.Module:
    """Make the dense model with the current weights of ``model``, in a separate module tree, without gradients.

    Its processors are those from before ``flexclear.transform``. Because the tree is separate, running it changes nothing about
    the student, in any thread and whatever is raised.

    Args:
        model: transformed or not.
        trained: parameters that the teacher gets copies of; all others are shared. None: everything is copied.
    """
    memo: dict[int, Any] = {}
    if trained is not None:
        own = {id(parameter) for parameter in trained}
        shared = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in own]
        memo = {id(tensor): tensor for tensor in shared}
    teacher = restore(copy.deepcopy(model, memo))
    return teacher.requires_grad_(False).eval()


def add_lora(model: Any, rank: int, alpha: int, seed: int = 0) -> dict[str, nn.Parameter]:
    """Add a LoRA to every attention projection with peft; return its parameters by name. Equal seeds give equal values.

    Adapters that are active stay so, beside it, and are frozen.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model already has one with this name.
    """
    require("peft", "train: lora")
    from peft import LoraConfig

    if ADAPTER in getattr(model, "peft_config", {}):
        raise ValueError(
            f"the model already has a LoRA named {ADAPTER!r}; call model.delete_adapters({ADAPTER!r}) first"
        )
    names = [name.removesuffix(".weight") for name in trained_parameters(model) if name.endswith(".weight")]
    before = [(layer, [] if layer.disable_adapters else list(layer.active_adapters)) for layer in lora_layers(model)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), ADAPTER)
    # add_adapter has switched the others off, which the teacher has too, and leaves layers off that were.
    for layer, active in before:
        layer.set_adapter([*active, ADAPTER])
        layer.enable_adapters(True)
    found = {name: p for name, p in model.named_parameters() if ".lora_" in name and f".{ADAPTER}." in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in found)
    return found


def lora_layers(model: nn.Module) -> list[Any]:
    """The layers of peft in a model, each around a layer of the model's own."""
    return [
        module for module in model.modules() if hasattr(module, "base_layer") and hasattr(module, "active_adapters")
    ]


def merge_lora(model: nn.Module) -> None:
    """Merge the LoRA of ``add_lora`` into the base weights. The adapter stays: delete it afterwards."""
    with torch.no_grad():
        for module in model.modules():
            if ADAPTER in getattr(module, "lora_A", {}) and hasattr(module, "get_delta_weight"):
                weight: Any = module.base_layer.weight  # type: ignore[union-attr]
                weight.add_(module.get_delta_weight(ADAPTER).to(weight.dtype))  # type: ignore[operator]
