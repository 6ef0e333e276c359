"""Sigmoid attention: every pair is weighted on its own, without competition between keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from flexclear.masks import Layout
from flexclear.runtime.mechanism import Attend, Formula

if TYPE_CHECKING:
    from flexclear.runtime.plan import Plan

MAX_SCORES = 1 << 28
"""Maximum number of scores computed at a time; more are split along the queries."""


@dataclass(frozen=True)
class SigmoidAttention(Formula):
    r"""Sigmoid attention over everything, text and image.

    .. math:: o_i = \sum_j \sigma\left(\frac{q_i \cdot k_j}{\sqrt{d}} - \log n\right) v_j

    with n the number of keys, so that weights of zero scores sum to about 1.
    """

    kind: ClassVar[str] = "sigmoid"
    source: ClassVar[str] = (
        "Ramapuram et al. 2024, Theory and Best Practices of Sigmoid Self-Attention, arXiv 2409.04431"
    )

    def bind(self, plan: Plan) -> Attend:
        return sigmoid_attention

    def flops(self, layout: Layout, channels: int, heads: int, layer: int = 0) -> int:
        """Two products over every pair; the sigmoid, like softmax, is not counted."""
        return 4 * channels * layout.seq_len**2


def sigmoid_attention(query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None = None) -> Tensor:
    """The formula over ``[B, heads, N, head_dim]``. All scores are computed, ``MAX_SCORES`` at a time."""
    shift = math.log(key.shape[2])
    query = query.to(value.dtype) / math.sqrt(query.shape[-1])
    turned = key.to(value.dtype).transpose(2, 3)
    rows = max(MAX_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]), 1)
    parts = [torch.sigmoid(part @ turned - shift) @ value for part in query.split(rows, dim=2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
