"""Parameters sharded across devices by FSDP, or by DeepSpeed's ZeRO stage 3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from flexclear.convert import transform
from flexclear.distill.model_state import unwrapped
from flexclear.runtime.hooks import entry_hook_of
from flexclear.runtime.schedule import Radius

Kind = Literal["fsdp", "zero"]


def sharding_of(accelerator: Any) -> Kind | None:
    """What shards parameters under this accelerator; None: every device holds all of them."""
    from accelerate import DistributedType

    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "zero" if accelerator.state.deepspeed_plugin.zero_stage == 3 else None
    return None


@contextlib.contextmanager
def loaded_whole(accelerator: Any) -> Iterator[None]:
    """Models loaded inside the block are whole; under ZeRO stage 3 transformers would otherwise shard them while loading.

    accelerate's ``zero3_init_context_manager`` is meant for this, but does not change what transformers (5.23) looks at.
    """
    if sharding_of(accelerator) != "zero":
        yield
        return
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        accelerator.state.deepspeed_plugin.set_deepspeed_weakref()


def follow(kind: Kind | None, model: nn.Module, trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the trained parameters after the accelerator has prepared the model: FSDP replaces parameters with new ones."""
    if kind != "fsdp":
        return trained
    now = {unwrapped(name): parameter for name, parameter in model.named_parameters()}
    return {name: now.get(name, parameter) for name, parameter in trained.items()}


def clip(accelerator: Any, kind: Kind | None, student: nn.Module, trained: list[nn.Parameter], norm: float) -> float:
    """Clip the gradients to ``norm`` and return their norm. DeepSpeed clips by itself, see ``processes.match_deepspeed``."""
    # FSDP computes the norm over all shards if it is given all parameters that it shards.
    clipped = list(student.parameters()) if kind == "fsdp" else trained
    found = accelerator.clip_grad_norm_(clipped, norm)
    return float(found.full_tensor() if hasattr(found, "full_tensor") else found)


def gather(accelerator: Any, kind: Kind, student: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters whole, by their names in ``model``, on the main process. Every process must call it."""
    if kind == "fsdp":
        return {unwrapped(name): tensor for name, tensor in accelerator.get_state_dict(student).items()}
    import deepspeed

    gathered = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if accelerator.is_main_process:
                gathered[name] = parameter.detach().cpu().clone()
    return gathered


def window_like(teacher: Any, student: Any) -> None:
    """Transform a whole model in the same way as the sharded student."""
    entry = entry_hook_of(student)
    assert entry is not None
    if entry.settings.formula is not None:
        transform(teacher, attention=entry.settings.formula, backend="sdpa")
        return
    windows: dict[int | str, Radius] = dict(entry.settings.windows.items())
    transform(teacher, windows, backend="sdpa")


def fill(model: nn.Module, numbers: dict[str, torch.Tensor]) -> None:
    """Copy the result of ``gather`` into a whole model with the same parameter names."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(numbers[name])
