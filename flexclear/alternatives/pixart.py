"""PixArt-Sigma's key / value compression: one key and value per cell of the image grid."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from flexclear.masks import Layout
from flexclear.masks.checks import check_int
from flexclear.masks.defaults import independent
from flexclear.masks.layout import MAX_SIDE
from flexclear.runtime.attention import windowed_attention
from flexclear.runtime.mechanism import Attend, Formula, one_grid
from flexclear.runtime.pooling import Pooling, make_pooling

if TYPE_CHECKING:
    from flexclear.runtime.plan import Plan


@dataclass(frozen=True)
class PixArtAttention(Formula):
    r"""Softmax attention in which image queries see text keys and compressed image keys.

    .. math:: \tilde k_c = \sum_{p \in c} w_p \odot k_p, \quad \tilde v_c = \sum_{p \in c} w_p \odot v_p

    A strided depth-wise convolution, initialized as the mean, is shared by keys and values as in PixArt-Sigma: the parameter
    ``<block>.attn.processor.compression_weight``, ``[channels, 1, factor, factor]``. It has no bias, and is not followed by
    PixArt-Sigma's norm, so that it starts as the mean. Keys are taken after QK-norm and RoPE, like CLEAR's down-sampled ones.

    Text queries see everything uncompressed, which agrees with the published FLOPs: if text queries also saw compressed keys,
    43.5 GFLOPs would remain of the 67.7.

    A cell that is cut off by the border spreads its weights over the tokens that it has: they are scaled by cell size over
    tokens present, so that equal weights stay a mean.

    Args:
        factor: side of a cell in tokens; published: 4, so 256 keys at 1024 px.
    """

    kind: ClassVar[str] = "pixart"
    source: ClassVar[str] = "Chen et al. 2024, PixArt-Sigma, arXiv 2403.04692"
    factor: int = 4

    def __post_init__(self) -> None:
        check_int("compression factor", self.factor, 1, MAX_SIDE, "in tokens")

    @property
    def name(self) -> str:
        return f"pixart_d{self.factor}"

    def weight_shape(self, channels: int) -> tuple[int, ...]:
        return channels, 1, self.factor, self.factor

    def initial_weight(self) -> float:
        return 1 / self.factor**2

    def bind(self, plan: Plan) -> Attend:
        one_grid(plan.layout, "PixArt-Sigma's compression")
        return functools.partial(pixart_attention, pooling=_pooling(plan.layout, self.factor, plan.rows.device))

    def flops(self, layout: Layout, channels: int, heads: int, layer: int = 0) -> int:
        """Softmax attention over the allowed pairs, and the convolution of keys and of values."""
        cells = -(-layout.height // self.factor) * -(-layout.width // self.factor)
        pairs = layout.text_len * layout.seq_len + layout.image_len * (layout.text_len + cells)
        return 4 * channels * pairs + 4 * channels * layout.image_len


@functools.lru_cache(maxsize=16)
@independent
def _pooling(layout: Layout, factor: int, device: torch.device) -> Pooling:
    return make_pooling(layout, factor, device)


def compress(image: Tensor, weight: Tensor, pooling: Pooling) -> Tensor:
    """Compress keys or values ``[B, heads, image_len, head_dim]`` to one per cell, ``[B, heads, cells, head_dim]``.

    Args:
        image: keys or values in image order.
        weight: ``[heads * head_dim, 1, d, d]``.
        pooling: the cells.
    """
    cells, places = pooling.share.shape
    gathered = image.index_select(2, pooling.members).unflatten(2, (cells, places))
    factors = weight.reshape(image.shape[1], image.shape[3], places).to(image.dtype)
    return torch.einsum("bhcpd,hdp,cp->bhcd", gathered, factors, pooling.share.to(image.dtype))


def pixart_attention(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None = None, *, pooling: Pooling
) -> Tensor:
    """The formula over ``[B, heads, N, head_dim]`` in sequence order, text first."""
    assert weight is not None
    text_len = key.shape[2] - pooling.image_len
    (text_key, image_key), (text_value, image_value) = (t.tensor_split([text_len], dim=2) for t in (key, value))
    seen_key = torch.cat([text_key, compress(image_key, weight, pooling)], dim=2)
    seen_value = torch.cat([text_value, compress(image_value, weight, pooling)], dim=2)
    text = windowed_attention(query[:, :, :text_len], key, value, None)
    image = windowed_attention(query[:, :, text_len:], seen_key, seen_value, None)
    return torch.cat([text, image], dim=2)
