"""Names and shapes: which of a model's parameters are trained, and whether a file has them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from flexclear.families import Layer
from flexclear.families.target import TRANSFORMERS, names_of
from flexclear.masks import Downsampled, Window
from flexclear.weights.files import FLOATS, Header
from flexclear.weights.requantizing import DTYPES, Place, place_of

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Trained modules of an attention layer. Single-stream blocks have no ``to_out``."""

POOLING = "processor.spatial_weight"
SHOWN = 4


def prefixes(model_or_pipe: Any) -> list[str]:
    """Prefix in a file of each of ``models_of``; empty for a pipeline's first transformer."""
    return ["" if name == TRANSFORMERS[0] else f"{name}." for name in names_of(model_or_pipe)]


def projections(model: nn.Module, layers: Sequence[Layer]) -> dict[str, nn.Parameter]:
    """The trained parameters of the attention layers by their released names, found below LoRA layers.

    Raises:
        ValueError: they are fused, quantized, offloaded, or the layers have none; the message says what to do.
    """
    return {
        f"{name}.{kind}": _plain(getattr(linear, kind), f"{name}.{kind}")
        for name, linear, kind in _trained(model, layers)
    }


def places(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Place]:
    """Where the tensors of a file go, by their released names: the same parameters, including quantized ones.

    Raises:
        ValueError: they are fused, offloaded, quantized in a way that cannot be repeated, or the layers have none.
    """
    config = getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "quant_type", None)
    found: dict[str, Place] = {}
    for linear_name, linear, kind in _trained(model, layers):
        name = f"{linear_name}.{kind}"
        found[name] = place_of(linear, kind, name, config)
        config = getattr(found[name], "config", config)  # tried first for the next
    return found


def _trained(model: nn.Module, layers: Sequence[Layer]) -> Iterator[tuple[str, Any, str]]:
    """The linear layers of the projections by their released names, and the parameters that they have."""
    _check_not_on_disk(model)
    for layer in layers:
        if getattr(layer.module, "fused_projections", False):
            raise ValueError(
                f"{layer.name} has fused projections (fuse_qkv_projections), which hide the to_q, to_k and to_v that weights "
                "files hold. Call model.unfuse_qkv_projections() first, and fuse again afterwards"
            )
        for part in PROJECTIONS:
            linear = _part(layer.module, part)
            if linear is None:
                if part == "to_out.0":
                    continue
                raise ValueError(
                    f"{layer.name} of this {type(model).__name__} has no {part}; weights files hold the to_q, to_k and "
                    "to_v of every attention layer"
                )
            name = f"{layer.name}.{part}"
            linear = _below_lora(linear, name)
            for kind in ("weight", "bias"):
                if getattr(linear, kind, None) is not None:
                    yield name, linear, kind


def _check_not_on_disk(model: nn.Module) -> None:
    """Raise if groups of the model's parameters are on disk: those in memory are empty, and refilled in each call."""
    for name, module in model.named_modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if getattr(getattr(hook, "group", None), "offload_to_disk_path", None) is not None:
                raise ValueError(
                    f"{name or 'the model'} is offloaded to disk in groups (offload_to_disk_path). Load or save weights "
                    "before enable_group_offload"
                )


def _part(module: Any, path: str) -> Any:
    for name in path.split("."):
        if isinstance(module, nn.ModuleList):
            module = module[int(name)] if int(name) < len(module) else None
        else:
            module = getattr(module, name, None)
    return module


def _below_lora(linear: Any, name: str) -> Any:
    while hasattr(linear, "base_layer"):
        if getattr(linear, "merged", False):
            raise ValueError(
                f"a LoRA is fused into {name}, and could not be taken out again. Call pipe.unfuse_lora() first, fuse afterwards"
            )
        linear = linear.base_layer
    return linear


def _plain(parameter: Any, name: str) -> nn.Parameter:
    if isinstance(parameter, Tensor) and parameter.is_meta:
        raise ValueError(
            f"{name} is on the meta device: the model is offloaded in parts, or not loaded. Load or save weights before "
            "enable_sequential_cpu_offload"
        )
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor or parameter.dtype not in DTYPES:
        kind = type(getattr(parameter, "data", parameter)).__name__
        raise ValueError(
            f"{name} is quantized ({kind}, {getattr(parameter, 'dtype', None)}). Save weights of the original model, before "
            "it is quantized"
        )
    return parameter


def pooling_shapes(windows: Mapping[str, Window | None]) -> dict[str, tuple[int, ...]]:
    """Shapes of the pooling weights of layers with these windows, by released name."""
    return {
        f"{name}.{POOLING}": (1, 1, 1, window.factor, 1, window.factor, 1)
        for name, window in windows.items()
        if isinstance(window, Downsampled)
    }


def factor_of(shape: tuple[int, ...] | None) -> int | None:
    """The down factor of pooling weights with this shape; None if it is not such a shape."""
    if shape is None or len(shape) != 7 or shape[3] < 1 or shape != (1, 1, 1, shape[3], 1, shape[3], 1):
        return None
    return shape[3]


def check_base(header: Header, base: str | None, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if the file is for a model with another number of blocks or another width.

    Raises:
        ValueError: it is.
    """
    theirs, ours = _anatomy(header.shapes), _anatomy(shapes)
    if theirs != ours and theirs is not None:
        named = f" (base model {base})" if base else ""
        given = getattr(getattr(model, "config", None), "_name_or_path", None)
        raise ValueError(
            f"{header.path} holds weights for {theirs}{named}, and this {type(model).__name__}"
            f"{f' ({given})' if given else ''} has {ours}: another base model. "
            f"{_differences(header, shapes, ignore_pooling=True)}. Nothing was changed"
        )


def _anatomy(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Describe the blocks of each stack and their width; None if no key has the released layout."""
    blocks: dict[str, set[str]] = {}
    widths = set()
    for key, shape in shapes.items():
        parts = re.fullmatch(r"([\w.]+?)\.(\d+)\.(?:\w+\.)*to_[qkv]\.weight", key)
        if parts is not None:
            blocks.setdefault(parts[1], set()).add(parts[2])
            widths.add(shape[-1] if shape else 0)
    if not blocks:
        return None
    stacks = " + ".join(f"{len(blocks[stack])} {stack}" for stack in sorted(blocks, reverse=True))
    return f"{stacks} of width {' or '.join(map(str, sorted(widths)))}"


def check_keys(header: Header, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the file holds exactly these tensors, as floating-point numbers.

    Raises:
        ValueError: keys are missing or unexpected, or shapes or types are wrong; the message lists the first few of each.
    """
    differences = _differences(header, shapes)
    if differences:
        raise ValueError(f"{header.path} does not fit the model: {differences}. Nothing was changed")


def _differences(header: Header, shapes: Mapping[str, tuple[int, ...]], ignore_pooling: bool = False) -> str:
    missing = [key for key in shapes if key not in header.shapes]
    unexpected = [
        key for key in header.shapes if key not in shapes and not (ignore_pooling and key.endswith("." + POOLING))
    ]
    wrong = [
        f"{key} is {tuple(header.shapes[key])} in the file, {tuple(shape)} in the model"
        for key, shape in shapes.items()
        if key in header.shapes and tuple(header.shapes[key]) != tuple(shape)
    ]
    types = [f"{key} is {header.dtypes[key]}" for key in shapes if header.dtypes.get(key, "F32") not in FLOATS]
    said = [
        f"{len(found)} {what}: {', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''}"
        for what, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", wrong),
            (f"of another type than {', '.join(FLOATS)}", types),
        )
        if found
    ]
    return "; ".join(said)
