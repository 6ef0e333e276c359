"""Low-precision recipes: their torchao configurations, and which of them a device can run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FP8_CAPABILITY = (8, 9)
"""Lowest compute capability whose tensor cores multiply FP8 (Ada, Hopper)."""


def _rowwise() -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)


def _tensorwise() -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerTensor

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor(), set_inductor_config=False)


def _weight_only() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig(set_inductor_config=False)


def _int8() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


@dataclass(frozen=True)
class Recipe:
    """One way to store and multiply a linear layer's weights in eight bits.

    Attributes:
        name: its name in ``quantize``.
        summary: one line.
        config: makes torchao's configuration.
        multiplies_fp8: whether it needs FP8 tensor cores.
        dtypes: types of weights that it accepts.
    """

    name: str
    summary: str
    config: Callable[[], Any]
    multiplies_fp8: bool
    dtypes: tuple[torch.dtype, ...]


_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("rowwise", "FP8 weights and activations, one scale per row", _rowwise, True, (torch.bfloat16,)),
        Recipe("tensorwise", "FP8 weights and activations, one scale per tensor", _tensorwise, True, _FLOATS),
        Recipe(
            "weight_only",
            "FP8 weights, multiplied in the model's own type: saves memory, not time",
            _weight_only,
            False,
            _FLOATS,
        ),
        Recipe("int8", "INT8 weights and activations, one scale per row", _int8, False, _FLOATS),
    )
}
"""Quantization recipes by name."""


INEXACT_INT8 = (
    "without VNNI instructions, which this CPU lacks, oneDNN's eight-bit products overflow and come out wrong"
)


@functools.cache
def _int8_products_are_exact() -> bool:
    """Whether this CPU adds up the largest eight-bit products correctly, when their sum exceeds 16 bits."""
    left, right = (torch.full(size, 127, dtype=torch.int8, device="cpu") for size in ((32, 64), (64, 32)))
    return bool((torch._int_mm(left, right) == 64 * 127 * 127).all())


def why_not_recipe(name: str, device: torch.device) -> str | None:
    """Why a recipe cannot run on ``device``, or None if it can.

    Raises:
        ValueError: the recipe is unknown.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {list(RECIPES)}, got {name!r}")
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        return f"torchao cannot be imported: {error}"
    if name == "int8" and device.type == "cpu" and not _int8_products_are_exact():
        return INEXACT_INT8
    if not RECIPES[name].multiplies_fp8:
        return None
    if device.type != "cuda":
        there = (
            ", and the model is not on the GPU that is here: pass device='cuda'" if torch.cuda.is_available() else ""
        )
        return f"FP8 products need a CUDA device; this is {device.type!r}{there}"
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        return (
            f"FP8 products need compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]}; "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        )
    return None


def runnable_recipes(device: torch.device) -> list[str]:
    """Names of the recipes that ``device`` can run."""
    return [name for name in RECIPES if why_not_recipe(name, device) is None]


def check_recipe(name: str, device: torch.device) -> str:
    """``name`` if ``device`` can run that recipe.

    Raises:
        ValueError: it is unknown, or cannot run; the message names the device and the recipes that it can run.
    """
    obstacle = why_not_recipe(name, device)
    if obstacle is not None:
        raise ValueError(f"recipe {name!r} cannot run here: {obstacle}. This device can run {runnable_recipes(device)}")
    return name
