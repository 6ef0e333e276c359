"""Linear layers in eight bits through torchao: which ones, how, and how much memory this saves."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.compile.blocks import repeated_blocks
from flexclear.compile.recipes import RECIPES, check_recipe
from flexclear.compile.undoing import undo

MIN_FEATURES = 256
"""Linears with fewer input or output features gain nothing: most of their time goes into launching the kernel."""

_LIBRARIES = ("optimum.quanto", "bitsandbytes", "diffusers.quantizers", "modelopt", "nunchaku", "sdnq", "auto_round")
"""Packages whose layers keep their weights in low precision (``diffusers.quantizers`` has GGUF's)."""

_MODULATION = ("norm", "mod", "modulation", "adaln_modulation", "img_mod", "txt_mod")


@dataclass(frozen=True)
class QuantizationReport:
    """What ``quantize`` did. ``print`` it.

    Attributes:
        recipe: name of the recipe.
        quantized: names of the linears in low precision.
        kept: the other linears by name, each with the reason why it stays in high precision.
        bytes_before, bytes_after: size of all the model's weights.
    """

    recipe: str
    quantized: tuple[str, ...]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        reasons = Counter(self.kept.values())
        lines = [
            f"{len(self.quantized)} linears in {self.recipe}: {RECIPES[self.recipe].summary}",
            f"weights {self.bytes_before / 2**20:.1f} MiB -> {self.bytes_after / 2**20:.1f} MiB",
            *(f"{count} linears kept: {reason}" for reason, count in reasons.most_common()),
        ]
        return "\n".join(lines)


def why_kept(name: str, linear: nn.Linear, in_block: bool, min_features: int = MIN_FEATURES) -> str | None:
    """Why a linear stays in high precision, or None if it should be quantized.

    Args:
        name: path of the module in the model.
        linear: the layer.
        in_block: whether it lies inside one of the repeated transformer blocks.
        min_features: least number of input and of output features.
    """
    parts = name.lower().split(".")
    if not in_block:
        return "outside the transformer blocks: an embedder or the final layer, run once per step and sensitive"
    if any(part in _MODULATION or part.startswith("norm") or part.endswith("_mod") for part in parts):
        return "modulation: scales and shifts every token, runs on one token"
    if "processor" in parts or any(part.startswith("lora_") for part in parts):
        return "an adapter's layer: small, and swapped at run time"
    if linear.in_features % 16 or linear.out_features % 16:
        return "odd shape: eight-bit products need multiples of 16"
    if min(linear.in_features, linear.out_features) < min_features:
        return f"tiny: fewer than {min_features} features"
    return None


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight of ``model`` is one of torchao's tensors."""
    return any(_is_torchao(parameter) for parameter in model.parameters())


def _is_torchao(tensor: Tensor) -> bool:
    return type(tensor.data).__module__.startswith("torchao.")


def quantized_elsewhere(model: nn.Module) -> str | None:
    """A description of a layer of ``model`` that a library other than torchao keeps in low precision; None: there is none."""
    for name, module in model.named_modules():
        packages = [kind.__module__ + "." for kind in type(module).__mro__]
        library = next((known for known in _LIBRARIES if any(p.startswith(known + ".") for p in packages)), None)
        weight = getattr(module, "weight", None)
        if library is None and isinstance(module, nn.Linear) and isinstance(weight, Tensor):
            kind = type(weight.data)
            if not kind.__module__.startswith(("torch.", "torchao.")) and kind is not Tensor:
                library = kind.__module__
            elif not _is_torchao(weight) and not weight.is_floating_point():
                library = type(module).__module__
        if library is not None:
            return f"{name} is a {type(module).__name__} of {library}"
    return None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers, including the scales of quantized weights."""
    return sum(_bytes_of(tensor) for tensor in [*model.parameters(), *model.buffers()])


def _bytes_of(tensor: Tensor) -> int:
    inner: Any = tensor.data
    if _is_torchao(tensor):
        names = [*inner.tensor_data_names, *getattr(inner, "optional_tensor_data_names", [])]
        parts = [getattr(inner, name) for name in names]
        return sum(part.numel() * part.element_size() for part in parts if part is not None)
    return tensor.numel() * tensor.element_size()


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear, bool]]:
    """For every linear of ``model``: its name, the module, and whether it lies in a repeated block."""
    inside = {id(module) for block in repeated_blocks(model) for module in block.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module, id(module) in inside


def quantize(
    model: nn.Module,
    recipe: str = "rowwise",
    *,
    min_features: int = MIN_FEATURES,
    keep: Callable[[str, nn.Linear], bool] | None = None,
    device: torch.device | str | None = None,
) -> QuantizationReport:
    """Store the big linears of ``model``'s transformer blocks in eight bits, in place.

    The order of passes is: transform, weights, LoRA, quantize, compile; then offload. Transforming may also come later, and
    compiling earlier. A LoRA to be fused must be fused and unloaded before (``pipe.unload_lora_weights()`` leaves fused
    weights in place): eight-bit weights cannot be changed, so peft's ``fuse_lora`` raises afterwards (``pipe.unfuse_lora()``
    then undoes it in the linears that were kept). Adapters that stay separate may be loaded before or after, scaled, mixed
    and hot-swapped: they run in the model's own type alongside the eight-bit weights.

    Convert the model to its final type first: ``model.to(dtype)`` does not change eight-bit weights, and with ``weight_only`` the
    next call raises. ``save_quantized`` writes the result to safetensors; diffusers' ``save_pretrained`` can only pickle it
    (``safe_serialization=False``). The model can be offloaded to memory, not to disk.

    If the original weights do not fit on the GPU, leave the model on the CPU and pass ``device``: the linears are moved there and
    quantized one by one, then the rest of the model follows. The GPU needs room for the result and one linear.

    Args:
        model: a transformer.
        recipe: a name of ``flexclear.compile.RECIPES``: ``"rowwise"`` and ``"tensorwise"`` (FP8 products; compute
            capability 8.9 or later), ``"weight_only"`` (anywhere), ``"int8"`` (older GPUs, CPU).
        min_features: linears with fewer input or output features are kept.
        keep: called with (name, linear); True keeps a linear that the rules would quantize.
        device: where the model will run; all of it is there afterwards. None: where its weights are.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the recipe is unknown or this device cannot run it (the message names the device and the recipes it can
            run), the recipe does not accept weights of this type, the model is already quantized (by any library), is
            offloaded or has a fused LoRA that is still loaded, or there is nothing to quantize. Nothing is changed then.

    After any other exception, such as running out of memory, a model that was being moved is restored. A model that was
    being quantized in place has lost some of its original weights; a note on the exception says how many.
    """
    target = None if device is None else _indexed(torch.device(device))
    chosen, kept = choose_linears(model, recipe, min_features, keep, target)

    from torchao.quantization import quantize_

    before = weight_bytes(model)
    marked = {id(linear) for linear in chosen.values()}
    moved = target is not None and any(parameter.device != target for parameter in model.parameters())
    try:
        with _put_back(model, chosen) if moved else _said(model, chosen):
            quantize_(
                model, RECIPES[recipe].config(), filter_fn=lambda module, name: id(module) in marked, device=target
            )
    finally:
        for linear in chosen.values():
            # torchao gives each linear its own extra_repr method, which cannot be pickled.
            linear.__dict__.pop("extra_repr", None)
    return QuantizationReport(recipe, tuple(chosen), kept, before, weight_bytes(model))


def _indexed(device: torch.device) -> torch.device:
    """``device`` as tensors on it report it."""
    return torch.device(device.type, torch.cuda.current_device()) if device == torch.device("cuda") else device


@contextlib.contextmanager
def _put_back(model: nn.Module, chosen: Mapping[str, nn.Linear]) -> Iterator[None]:
    """If anything is raised in a ``with`` block, restore the parameters and buffers of ``model`` on their device.

    At the beginning, weights that will be quantized are replaced by copies: the originals kept here would otherwise be moved,
    and occupy the device.
    """
    kept: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
        (tensors, name, tensor, tensor.data)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]

    def put_back() -> None:
        for tensors, name, tensor, data in kept:
            tensor.data = data
            tensors[name] = tensor

    try:
        for linear in chosen.values():
            linear.weight = nn.Parameter(linear.weight.data, linear.weight.requires_grad)
        yield
    except BaseException:
        undo(put_back)
        raise


@contextlib.contextmanager
def _said(model: nn.Module, chosen: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Add a note to any exception raised in a ``with`` block that says how far quantizing got."""
    try:
        yield
    except BaseException as error:
        done = sum(_is_torchao(linear.weight) for linear in chosen.values())
        if done:
            error.add_note(
                f"flexclear: {done} of {len(chosen)} linears of this {type(model).__name__} are in eight bits now, the others "
                "are not. Load the original weights; from the CPU, quantize(..., device=...) is all or nothing"
            )
        raise


def choose_linears(
    model: nn.Module,
    recipe: str,
    min_features: int,
    keep: Callable[[str, nn.Linear], bool] | None = None,
    device: torch.device | None = None,
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """What ``quantize`` would do, with all its checks: the linears to quantize, and why each of the others is kept."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, got {type(model).__name__}; for a pipeline, pass pipe.transformer")
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError(f"this {type(model).__name__} has no weights")
    check_recipe(recipe, device or parameter.device)
    if is_quantized(model):
        raise ValueError(
            f"this {type(model).__name__} is already quantized: leave this pass out (fp8=False), or load the original "
            "weights to change the recipe"
        )
    foreign = quantized_elsewhere(model)
    if foreign is not None:
        raise ValueError(
            f"this {type(model).__name__} is already quantized ({foreign}): leave this pass out (fp8=False), or load the "
            "original weights"
        )
    check_not_offloaded(model, "Quantize first, then offload")
    _check_no_fused_lora(model)
    kept, chosen = {}, {}
    for name, linear, in_block in linears(model):
        reason = why_kept(name, linear, in_block, min_features)
        if reason is None and recipe == "tensorwise" and linear.weight.shape == (128, 128):
            # torchao 0.18 tells kinds of scales apart by the block that one covers, and would expect 1 x 128 for the input.
            reason = "128 x 128: torchao would mistake its one scale for a block's"
        if reason is None and keep is not None and keep(name, linear):
            reason = "kept on request"
        if reason is None:
            chosen[name] = linear
        else:
            kept[name] = reason
    if not chosen:
        reasons = "; ".join(sorted(set(kept.values())))
        raise ValueError(f"this {type(model).__name__} has no linear to quantize: {reasons or 'it has none at all'}")
    wrong = {linear.weight.dtype for linear in chosen.values()} - set(RECIPES[recipe].dtypes)
    if wrong:
        wanted = ", ".join(str(dtype) for dtype in RECIPES[recipe].dtypes)
        raise ValueError(
            f"recipe {recipe!r} takes weights of {wanted}, got {', '.join(map(str, wrong))}: model.to(torch.bfloat16)"
        )
    return chosen, kept


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of ``model`` that peft has wrapped, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}


def check_not_offloaded(model: nn.Module, advice: str) -> None:
    """Raise if ``model`` is offloaded, so that weights are elsewhere between calls: hooks would overwrite changed ones.

    Raises:
        ValueError: it is; the message ends with ``advice``.
    """
    for name, module in model.named_modules():
        if "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            raise ValueError(f"{name or 'the model'} is offloaded in groups (enable_group_offload). {advice}")
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise ValueError(
            f"{away} is on the meta device: the model is offloaded in parts (enable_sequential_cpu_offload), or not "
            f"loaded. {advice}"
        )


def _check_no_fused_lora(model: nn.Module) -> None:
    fused = next((name for name, layer in lora_layers(model).items() if getattr(layer, "merged", False)), None)
    if fused is not None:
        raise ValueError(
            f"a LoRA is fused into {fused} and still loaded, and could not be taken out of eight-bit weights again. "
            "pipe.unload_lora_weights() keeps the fused weights and drops the LoRA; pipe.unfuse_lora() keeps it separate"
        )


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise, 20 log10(|reference| / |reference - approximation|), in dB."""
    reference, noise = reference.float(), reference.float() - approximation.float()
    return float(20 * torch.log10(reference.norm() / noise.norm().clamp_min(1e-30)))
