"""A model's weights before and after training, and its other state, which training leaves unchanged."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from flexclear.compile.files import whole_file, write_errors
from flexclear.compile.undoing import afterwards
from flexclear.convert import transform_again
from flexclear.distill.students import ADAPTER, lora_layers, trained_parameters
from flexclear.runtime.hooks import entry_hook_of
from flexclear.weights import load_weights, save_weights


@contextlib.contextmanager
def as_found(model: Any) -> Iterator[None]:
    """Restore what training sets on the model besides weights: gradients, types, mode, checkpointing, forward, adapters."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    dtypes = {parameter: parameter.dtype for parameter in model.parameters()}
    training, checkpointing = model.training, getattr(model, "is_gradient_checkpointing", False)
    forward = model.__dict__.get("forward")
    adapted = {layer: (list(layer.active_adapters), layer.disable_adapters) for layer in lora_layers(model)}

    def put_back() -> None:
        for layer, (active, disabled) in adapted.items():
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)
        if ADAPTER in getattr(model, "peft_config", {}):
            model.delete_adapters(ADAPTER)
        _unwrap(model, adapted)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
            parameter.data = parameter.data.to(dtypes[parameter])
        model.train(training)
        if not checkpointing and getattr(model, "is_gradient_checkpointing", False):
            model.disable_gradient_checkpointing()
        model.__dict__.pop("forward", None)
        if forward is not None:
            model.forward = forward

    with afterwards(put_back):
        yield


@contextlib.contextmanager
def without_bars(pipe: Any) -> Iterator[None]:
    """Switch a pipeline's progress bars off inside the block."""
    own = dict(getattr(pipe, "_progress_bar_config", {}))
    with afterwards(lambda: pipe.set_progress_bar_config(**own)):
        pipe.set_progress_bar_config(**{**own, "disable": True})
        yield


def _unwrap(model: nn.Module, keep: Container[nn.Module]) -> None:
    """Put the layers inside peft's layers back in their places, under their own names in ``state_dict``."""
    layers = {id(layer) for layer in lora_layers(model) if layer not in keep}
    for name, module in list(model.named_modules()):
        if id(module) in layers:
            place, _, own = name.rpartition(".")
            setattr(model.get_submodule(place), own, module.base_layer)


def start_from(model: Any, path: Path) -> None:
    """Load a weights file and keep the model's own windows, whatever the file was trained for."""
    entry = entry_hook_of(model)
    assert entry is not None
    windows = dict(entry.settings.windows)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was trained for another window than the model has")
        load_weights(model, path)
    now = entry_hook_of(model)
    if now is not None and dict(now.settings.windows) != windows:
        transform_again(model, windows)


def write_weights(model: Any, path: Path) -> None:
    """Write a file for ``load_weights``. For attention with its own formula, the file has the same tensors under the model's
    own names, for ``load_state_dict(..., strict=False)`` of a model that is transformed in the same way."""
    entry = entry_hook_of(model)
    if entry is None or entry.settings.formula is None:
        save_weights(model, path)
        return
    from safetensors.torch import save_file

    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trained_parameters(model).items()}
    with whole_file(path) as beside:
        save_file(tensors, beside, {"format": "pt", "attention": repr(entry.settings.formula)})


def write_lora(model: Any, folder: Path) -> None:
    """Write the adapter into ``folder``, in the form that ``load_lora_adapter`` and PEFT read. Each file is atomic."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with write_errors(folder):
            model.save_lora_adapter(str(partial), adapter_name=ADAPTER)
            folder.mkdir(parents=True, exist_ok=True)
            for file in partial.iterdir():
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def unwrapped(name: str) -> str:
    """A parameter's name without the wrappers of FSDP and of activation checkpointing."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name
