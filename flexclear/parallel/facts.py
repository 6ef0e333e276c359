"""Compact facts that must be equal on all ranks, and a description of how they differ."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexclear.runtime.facts import Call, Settings

if TYPE_CHECKING:
    from flexclear.parallel.session import Options

SAMPLED = 4096
"""Number of elements of each tensor that are compared."""

TOLERANCE = 1e-2
"""Text encoders on different devices round differently; different prompts and seeds differ by far more."""

INPUTS = {
    "hidden_states": "the latents (another seed?)",
    "x": "the latents (another seed?)",
    "encoder_hidden_states": "the text (another prompt?)",
    "cap_feats": "the text (another prompt?)",
    "timestep": "the timestep",
    "t": "the timestep",
    "guidance": "the guidance",
}


def facts_of_call(kwargs: Mapping[str, Any], call: Call, thorough: bool) -> dict[str, Any]:
    """Sizes of a call, and if ``thorough`` a few sums of its inputs."""
    facts: dict[str, Any] = {
        "the sizes (height, width) in tokens": [list(grid) for grid in call.grids],
        "the number of text tokens": sorted(call.text_lens.items()),
        "the batch": list(call.tokens.shape),
        "the type": str(call.tokens.dtype),
    }
    if thorough:
        for name, meaning in INPUTS.items():
            value = kwargs.get(name)
            tensors = [value] if isinstance(value, Tensor) else list(value) if isinstance(value, Sequence) else []
            if tensors and all(isinstance(tensor, Tensor) for tensor in tensors):
                facts[meaning] = [number for tensor in tensors for number in sums(tensor)]
    return facts


def facts_of_model(model: nn.Module, settings: Settings, options: Options) -> dict[str, Any]:
    """Windows, settings and weights of a model."""
    own = settings.options()
    windows = own.pop("windows")
    facts: dict[str, Any] = {
        "the windows (r)": [f"{name}: {'dense' if window is None else window.name}" for name, window in windows.items()],
        "the settings of transform": [f"{name}={value!r}" for name, value in own.items()],
        "the settings of parallel.enable": sorted((name, str(value)) for name, value in asdict(options).items()),
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        facts[f"the weight {name}"] = digest(parameter)
    return facts


def sums(tensor: Tensor) -> list[float]:
    """Two numbers that depend on the tensor, but hardly change with rounding."""
    flat = tensor.detach().flatten()
    flat = flat[:: max(1, len(flat) // SAMPLED)].double()
    if len(flat) == 0:
        return [0.0, 0.0]
    pattern = torch.cos(torch.arange(len(flat), device=flat.device, dtype=torch.float64) * 1.7)
    size = flat.norm().item()
    return [size, (flat @ pattern).item()]


def digest(parameter: Tensor) -> str:
    """A short hash of some of a parameter's values; empty if it has none at the moment (offloaded)."""
    if parameter.is_meta:
        return ""
    inner = parameter.detach()
    for name in ("tensor_impl", "qdata", "int_data", "_data"):
        found = getattr(inner, name, None)
        if isinstance(found, Tensor) and type(inner) is not Tensor and type(inner) is not nn.Parameter:
            inner = found.detach()
    try:
        flat = inner.flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
        data = sample.view(torch.uint8).numpy().tobytes()
    except (RuntimeError, NotImplementedError, TypeError):
        return ""  # a tensor type whose values cannot be read
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def differences(said: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> str:
    """How ranks differ from the first one, in words; empty if they do not.

    Args:
        said: facts of each rank.
        ranks: global numbers of the ranks.
    """
    found = []
    for rank, facts in zip(ranks[1:], said[1:], strict=True):
        names = [name for name in said[0] if not _equal(said[0][name], facts.get(name))]
        names += [name for name in facts if name not in said[0]]
        if names:
            shown = ", ".join(_shown(name, said[0].get(name), facts.get(name)) for name in names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"rank {rank} differs from rank {ranks[0]} in {shown}{more}")
    return "; ".join(found)


def _shown(name: str, first: Any, other: Any) -> str:
    pairs = (first, other)
    if isinstance(first, list) and isinstance(other, list) and len(first) == len(other) and len(first) > 2:
        distinct = [(a, b) for a, b in zip(first, other, strict=True) if a != b]
        pairs = distinct[0] if distinct else pairs
    text = f"{pairs[1]} against {pairs[0]}"
    return f"{name}: {text}" if len(text) < 200 and not _numbers(first) else name


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(number, float) for number in value)


def _equal(first: Any, other: Any) -> bool:
    if _numbers(first) and _numbers(other) and len(first) == len(other):
        # Pairs of a norm and a projection; rounding is small relative to the norm.
        return all(
            math.isclose(a, b, abs_tol=TOLERANCE * max(abs(first[i - i % 2]), 1e-12))
            for i, (a, b) in enumerate(zip(first, other, strict=True))
        )
    return first == other
