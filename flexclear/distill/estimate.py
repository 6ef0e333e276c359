"""How much memory a run takes, from the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flexclear.distill.capture import compared_layers
from flexclear.distill.config import DistillConfig
from flexclear.distill.models import pipeline_folder, skeleton
from flexclear.families import family_of
from flexclear.weights.keys import PROJECTIONS

STATES = {"adamw": 2, "prodigy": 4}
"""Numbers that an optimizer keeps per trained parameter: two moments; Prodigy also the initial value and a running sum."""

PER_BLOCK = 28
"""Rough count of the numbers per token and channel that a FLUX block keeps for its backward pass: norms, queries, keys and
values before and after norm and rotation, attention output, and the MLP's fourfold width before and after activation."""

GIB = 1 << 30


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device that holds everything (one process or DDP).

    Attributes:
        parameters, trained: number of parameters, and of trained ones.
        exact: amounts that follow from the settings, by name.
        approximate: activations, by name.
    """

    parameters: int
    trained: int
    exact: dict[str, int]
    approximate: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.exact.values()) + sum(self.approximate.values())

    def __str__(self) -> str:
        lines = [f"{self.parameters / 1e9:.3f} billion parameters, {self.trained / 1e9:.3f} billion of them trained"]
        for title, parts in (("counted", self.exact), ("approximate", self.approximate)):
            lines += [f"{amount / GIB:9.3f} GiB  {name} ({title})" for name, amount in parts.items()]
        sharded = sum(self.exact[name] for name in ("gradients", "optimizer states"))
        lines += [
            f"{self.total / GIB:9.3f} GiB  in total",
            f"DeepSpeed's ZeRO stage 2 on n GPUs divides gradients and optimizer states, {sharded / GIB:.1f} GiB, by n.",
            "Activations are accurate to a factor of about two; the allocator's own needs, CUDA's context, DDP's buckets and "
            "compiled kernels are not included.",
        ]
        return "\n".join(lines)


def estimate(config: DistillConfig, size: tuple[int, int] = (1024, 1024), text_len: int = 512) -> Estimate:
    """Estimate a run.

    Args:
        config: with ``model``; only that model's configuration is read.
        size: (height, width) of the images in pixels.
        text_len: text tokens.

    Raises:
        FileNotFoundError: no such model.
        TypeError: a model that the trainer does not support.
        ValueError: ``config`` names no model.
    """
    if config.model is None:
        raise ValueError("model is missing")
    return estimate_model(skeleton(pipeline_folder(config.model)), config, size, text_len)


def estimate_model(model: Any, config: DistillConfig, size: tuple[int, int], text_len: int) -> Estimate:
    """Estimate a run of this model, which may be on the meta device."""
    family = family_of(model)
    layers = list(family.layers(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    linears = [part for layer in layers for name in PROJECTIONS if (part := _part(layer.module, name)) is not None]
    own = sum(parameter.numel() for linear in linears for parameter in linear.parameters())
    if config.train == "lora":
        trained = sum(config.lora.rank * (linear.in_features + linear.out_features) for linear in linears)
    else:
        trained = own + (config.down_factor or 0) ** 2 * len(layers)
    width = 4 if config.mixed_precision == "no" else 2
    lora = config.train == "lora"
    exact = {
        "frozen weights": (total - (0 if lora else own)) * width,
        "trained weights, float32": trained * 4,
        "gradients": trained * 4,
        "optimizer states": trained * 4 * STATES[config.optimizer.name],
    }
    if config.losses.prediction or config.losses.attention:
        if config.teacher == "copy":
            exact["the teacher's own copy"] = total * width
        elif not lora:
            exact["the teacher's projections"] = own * width
    if config.ema is not None:
        exact["average"] = trained * 4
    side = family.px_per_token
    tokens = (size[0] // side) * (size[1] // side) + text_len
    channels = model.config.num_attention_heads * model.config.attention_head_dim
    unit = config.batch_size * tokens * channels * width
    kept = len(layers) + PER_BLOCK if config.gradient_checkpointing else len(layers) * PER_BLOCK
    compared = len(compared_layers(model, config.losses.attention_every)) if config.losses.attention else 0
    approximate = {
        "activations" + (" with checkpointing" if config.gradient_checkpointing else ""): kept * unit,
        "attention outputs that are compared": 2 * compared * unit,
    }
    return Estimate(total, trained, exact, approximate)


def _part(module: Any, path: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
