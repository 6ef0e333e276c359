"""Softmax over keys that are distributed: partial results with their log-sum-exp, and merging them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 4096
"""Number of keys processed at a time when scores are materialized."""

_HALF = (torch.float16, torch.bfloat16)


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Dense softmax attention over some of the keys.

    Args:
        query, key, value: ``[B, heads, T, head_dim]`` and ``[B, heads, n, head_dim]``, of the same dtype; n may be 0.
        scale: factor on the scores, ``1 / sqrt(head_dim)`` by default.
        keep: bool ``[B, n]``, False for keys that nobody sees; None keeps all.

    Returns:
        Output ``[B, heads, T, head_dim]`` and the log-sum-exp of the scores ``[B, heads, T]``, both float32. Without keys:
        0 and -inf.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if key.shape[2] == 0:
        nothing = query.new_zeros((*query.shape[:3], value.shape[-1]), dtype=torch.float32)
        return nothing, query.new_full(query.shape[:3], -math.inf, dtype=torch.float32)
    kernel = None if keep is not None else _kernel(query, value)
    if kernel == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, scale=scale
        )
    elif kernel == "flash":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, False, False, scale=scale
        )[:2]
    elif kernel == "efficient":
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, False, scale=scale
        )[:2]
    else:
        return _written_out(query, key, value, scale, keep)
    return out.float(), lse[:, :, : query.shape[2]].float()


def _kernel(query: Tensor, value: Tensor) -> str | None:
    """The fused kernel that returns its log-sum-exp here, or None."""
    if query.device.type == "cpu":
        return "cpu" if query.dtype in (torch.float32, *_HALF) and query.shape[-1] == value.shape[-1] else None
    if query.device.type == "cuda" and query.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0:
        if query.dtype in _HALF and query.shape[-1] <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0):
            return "flash"
        return "efficient" if query.dtype in (torch.float32, *_HALF) else None
    return None


def _written_out(query: Tensor, key: Tensor, value: Tensor, scale: float, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    parts = []
    for start in range(0, key.shape[2], CHUNK):
        stop = start + CHUNK
        scores = (query.float() @ key[:, :, start:stop].float().mT) * scale
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, start:stop], -math.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
        parts.append((weights @ value[:, :, start:stop].float(), lse))
    return parts[0] if len(parts) == 1 else merged(parts)


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Softmax attention over all keys, merged from attention over disjoint sets of them.

    Args:
        parts: outputs and log-sum-exps as ``partial_attention`` returns them.
    """
    lse = torch.logsumexp(torch.stack([lse for _, lse in parts]), dim=0)
    safe = lse.masked_fill(lse == -math.inf, 0)
    out = sum(out * (part - safe).exp()[..., None] for out, part in parts)
    assert isinstance(out, Tensor)
    return out, lse


def weighted(out: Tensor, lse: Tensor, top: Tensor) -> Tensor:
    """A part in a form that can be summed over parts: ``[B, heads, T, head_dim + 1]``, numerators, then the denominator.

    Args:
        out, lse: the part.
        top: the greatest log-sum-exp of all parts, ``[B, heads, T]``.
    """
    weight = (lse - top).exp()[..., None]
    return torch.cat([out * weight, weight], dim=-1)
