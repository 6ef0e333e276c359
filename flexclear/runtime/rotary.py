"""Rotary embedding in real numbers, for models whose own uses complex numbers."""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, ``[B or 1, N, 1, head_dim]``, the same for both channels of a pair, in attention's token order."""


def rotated(states: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys ``[B, N, heads, head_dim]`` with neighbouring channels rotated as pairs."""
    # Shorter states belong to attention over the image alone, with which the sequence begins in such models (Z-Image).
    cos, sin = (table[:, : states.shape[1]] for table in rotary)
    # Real numbers, because Inductor does not fuse diffusers' complex ones; a sum last, because Inductor's FlexAttention on CPU
    # (torch 2.13) does not accept a concatenation as its query.
    first, second = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-second, first], dim=-1).flatten(-2)
    return (states.float() * cos + across * sin).to(states.dtype)


def cos_and_sin(frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each repeated twice, ``[..., head_dim]``, of diffusers' complex numbers, ``[..., head_dim / 2]``."""
    return frequencies.real.repeat_interleave(2, dim=-1), frequencies.imag.repeat_interleave(2, dim=-1)
