"""What a pipeline passes to its transformer, and LoRA weights for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def calls_of(transformer: torch.nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every call of a transformer, except ``return_dict``."""
    calls: list[dict[str, Any]] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args, "a pipeline hands something over by position"
        calls.append({name: value for name, value in kwargs.items() if name != "return_dict"})

    handle = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def assert_alike(call: dict[str, Any], handed: dict[str, Any]) -> None:
    """Assert that a call made by hand is like a pipeline's: names, shapes except for channels, types, ids and masks."""
    assert call.keys() == handed.keys()
    for name, value in call.items():
        _alike(name, value, handed[name])


def _alike(name: str, value: Any, given: Any) -> None:
    assert type(value) is type(given), name
    if isinstance(value, Tensor):
        exact = value.dtype == torch.bool or name.endswith("_ids")
        end = value.ndim if exact or value.ndim < 3 else -1
        assert (value.shape[:end], value.dtype) == (given.shape[:end], given.dtype), name
        assert not exact or torch.equal(value, given), name
    elif isinstance(value, dict):
        assert_alike(value, given)
    elif isinstance(value, list):
        assert len(value) == len(given), name
        for one, other in zip(value, given, strict=True):
            _alike(name, one, other)
    else:
        assert value == given, name


def lora_weights(transformer: torch.nn.Module, layers: Sequence[str] = ("to_q", "to_v"), seed: int = 1) -> dict:
    """A LoRA of rank 2 for these layers, named as diffusers does."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(tuple(layers)):
            down = torch.randn(2, module.in_features, generator=generator)
            up = torch.randn(module.out_features, 2, generator=generator)
            weights |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": 0.3 * up}
    return weights
