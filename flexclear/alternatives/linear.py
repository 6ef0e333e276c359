"""Linear attention: kernel feature maps instead of softmax, in time linear in the number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from flexclear.masks import Layout
from flexclear.runtime.mechanism import Attend, Formula

if TYPE_CHECKING:
    from flexclear.runtime.plan import Plan


@dataclass(frozen=True)
class LinearAttention(Formula):
    r"""Linear attention over everything, text and image, normalized.

    .. math:: o_i = \frac{\phi(q_i) \sum_j \phi(k_j)^T v_j}{\phi(q_i) \sum_j \phi(k_j)^T}, \quad \phi(x) = \mathrm{elu}(x) + 1

    The paper does not name its feature map; elu + 1 is the usual one. It is applied after QK-norm and RoPE, so that
    weights are positive and sum to 1.
    """

    kind: ClassVar[str] = "linear"
    source: ClassVar[str] = "Katharopoulos et al. 2020, Transformers are RNNs, arXiv 2006.16236"

    def bind(self, plan: Plan) -> Attend:
        return linear_attention

    def flops(self, layout: Layout, channels: int, heads: int, layer: int = 0) -> int:
        """Two products through a ``head_dim`` x ``head_dim`` state, and the normalizer: its sum of keys, its product with
        each query, one division."""
        return 4 * layout.seq_len * channels * (channels // heads) + 4 * layout.seq_len * channels


def feature_map(tokens: Tensor) -> Tensor:
    """elu(x) + 1, without the cancellation that would round small values to 0."""
    return torch.where(tokens > 0, tokens + 1, tokens.clamp(max=0).exp())


def linear_attention(query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None = None) -> Tensor:
    """The formula over ``[B, heads, N, head_dim]``. Sums over tokens are computed at least in float32."""
    exact = torch.promote_types(value.dtype, torch.float32)
    query, key = feature_map(query.to(exact)), feature_map(key.to(exact))
    state = key.transpose(2, 3) @ value.to(exact)
    total = key.sum(2, keepdim=True).transpose(2, 3)
    return (query @ state / (query @ total)).to(value.dtype)
