"""Quantized weights on disk: safetensors files with a bit-exact round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexclear.compile.files import whole_file
from flexclear.compile.quantize import check_not_offloaded, is_quantized, lora_layers

FORMAT = "flexclear-quantized-1"


def save_quantized(model: nn.Module, path: str | Path) -> Path:
    """Write all of a quantized model's weights to a safetensors file, through torchao's own flattening.

    This includes pooling weights (``down_factor``), but not LoRA layers, which have their own files.

    Args:
        model: the model that ``quantize`` was called on.
        path: the file; written under another name first, so that a crash leaves no partial file.

    Raises:
        ValueError: the model is not quantized, is offloaded in parts, or has a LoRA loaded.
    """
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    if not is_quantized(model):
        raise ValueError(f"this {type(model).__name__} is not quantized: use save_pretrained, or quantize it first")
    _check_no_lora(model, "Save")
    if any(parameter.is_meta for parameter in model.parameters()):
        check_not_offloaded(model, "Save first, then offload")
    path = Path(path)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors, metadata = flatten_tensor_state_dict(state)
    metadata["flexclear"] = json.dumps({"format": FORMAT, "model": type(model).__name__})
    with whole_file(path) as beside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata)
    return path


def load_quantized(model: nn.Module, path: str | Path) -> nn.Module:
    """Load weights written by ``save_quantized`` into a model of the same configuration, in place.

    Args:
        model: its parameters are replaced by those of the file, on the model's device. If the saved model had pooling
            weights (``down_factor``), transform this one in the same way first.
        path: the file.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold quantized weights, is damaged, or belongs to another model; or the model is offloaded
            or has a LoRA loaded. Nothing is changed then.
    """
    from safetensors import SafetensorError, safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    _check_no_lora(model, "Load")
    check_not_offloaded(model, "Load first, then offload")
    device = next(model.parameters()).device
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata: dict[str, Any] = file.metadata() or {}
            own = json.loads(metadata.pop("flexclear", "{}"))
            if own.get("format") != FORMAT:
                raise ValueError(
                    f"{path} does not hold quantized weights of flexclear's format {FORMAT}; its format: {own.get('format')!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    state, left = unflatten_tensor_state_dict(tensors, metadata)
    present = model.state_dict()
    missing, unexpected = sorted(present.keys() - state.keys()), sorted([*(state.keys() - present.keys()), *left])
    wrong = [n for n in state.keys() & present.keys() if state[n].shape != present[n].shape]
    if missing or unexpected or wrong:
        raise ValueError(
            f"{path} does not fit this {type(model).__name__} (it was saved from a {own.get('model')}): "
            f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}, "
            f"{len(wrong)} of another shape {sorted(wrong)[:3]}{_hint([*missing, *unexpected, *wrong])}"
        )
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_state_dict(state, strict=True, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(grads[name] and type(parameter.data) is torch.Tensor)
    return model


def _check_no_lora(model: nn.Module, action: str) -> None:
    wrapped = next(iter(lora_layers(model)), None)
    if wrapped is not None:
        raise ValueError(
            f"{wrapped} of this {type(model).__name__} has a LoRA loaded, which files of quantized weights do not hold. "
            f"{action} without it: pipe.unload_lora_weights(), and load the LoRA from its own file afterwards"
        )


def _hint(names: list[str]) -> str:
    if any(name.endswith(".processor.spatial_weight") for name in names):
        return ". Pooling weights differ: call flexclear.transform with the saved model's down_factor first"
    if any(".to_qkv." in name or ".to_added_qkv." in name for name in names):
        return ". One of them has fused projections: model.fuse_qkv_projections() on both, or on neither"
    return ""
