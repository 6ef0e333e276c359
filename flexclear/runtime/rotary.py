"""Rotary embedding in real numbers, for models whose own has complex ones."""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, ``[B or 1, N, 1, head_dim]``, both channels of a pair alike, in the order that tokens reach attention in."""


def rotated(states: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys ``[B, N, heads, head_dim]`` with neighbouring channels turned as pairs."""
    # Attention over the image alone, which is the sequence's beginning where there is such attention (Z-Image).
    cos, sin = (table[:, : states.shape[1]] for table in rotary)
    # Real numbers where diffusers has complex ones, which Inductor does not fuse; a sum last, because Inductor's
    # FlexAttention on CPU (torch 2.13) does not take a concatenation for its query.
    first, second = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-second, first], dim=-1).flatten(-2)
    return (states.float() * cos + across * sin).to(states.dtype)


def cos_and_sin(frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each twice in a row, ``[..., head_dim]``, of diffusers' complex numbers, ``[..., head_dim / 2]``."""
    return frequencies.real.repeat_interleave(2, dim=-1), frequencies.imag.repeat_interleave(2, dim=-1)
