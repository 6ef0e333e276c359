"""What one call of a transformed model passes to its attention layers: the mask of each kind of layer, and the computation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexclear.compile.direct import Held
from flexclear.runtime.attention import Mask, windowed_attention
from flexclear.runtime.mechanism import Attend
from flexclear.runtime.plan import Plan
from flexclear.runtime.pooling import Pooling
from flexclear.runtime.rotary import Rotary


@dataclass(frozen=True, eq=False)
class SlotPlan:
    """What one kind of layer (``flexclear.runtime.facts.Slot``) needs for its attention.

    Attributes:
        mask: a BlockMask, ``TextApart``, a dense bool mask, or None: dense attention.
        pooling: where its pooled keys come from, or None.
        gain: 0-d factor on its queries (proportional attention), or None.
        bias: ``[B, N]`` or ``[1, N]`` in sequence order, or None; ``bias[i] * bias[j]`` is added to the score of query i and
            key j.
        order: permutation of tokens that reach attention in raster order into the mask's sequence order, and its inverse, int64
            ``[N]``, or ``[B, N]`` if samples differ; or None.
        held: Dynamo's guards that its layers have passed in this call.
    """

    mask: Mask
    pooling: Pooling | None = None
    gain: Tensor | None = None
    bias: Tensor | None = None
    order: tuple[Tensor, Tensor] | None = None
    held: Held = field(default_factory=Held, repr=False)

    def scored(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, float | None]:
        """Query and key with gain and bias included, and the factor on their products. The bias becomes an extra channel,
        followed by a few zero channels of padding."""
        scale = None
        if self.gain is not None:
            query = (query.float() * self.gain).to(query.dtype)
        if self.bias is not None:
            scale = 1 / math.sqrt(query.shape[-1])
            channel = self.bias.to(query.dtype)[:, None, :, None].expand(*query.shape[:3], 1)
            channel = F.pad(channel, (0, -(query.shape[-1] + 1) % 8))
            query, key = torch.cat([query, channel / scale], dim=-1), torch.cat([key, channel], dim=-1)
        return query, key, scale


class Means(Protocol):
    """How a call computes attention: softmax over a window, in this process or shared by several, or a formula."""

    def attend(
        self, own: SlotPlan, slot: int, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None
    ) -> Tensor:
        """Attention of one layer, ``[B, heads, N, head_dim]`` in sequence order.

        Args:
            own: the layer's part of the plan.
            slot: number of that part.
            query, key, value: after norms and rotary embedding.
            weight: pooling weights of a layer with down-sampled keys (method, section 4), weights of a formula, or None.
        """


class Locally:
    """Softmax over each slot's mask."""

    def attend(
        self, own: SlotPlan, slot: int, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None
    ) -> Tensor:
        """See ``Means``."""
        query, key, scale = own.scored(query, key)
        if own.pooling is not None and weight is not None:
            key, value = own.pooling.append(key, weight), own.pooling.append(value, weight)
        return windowed_attention(query, key, value, own.mask, scale, own.held)


LOCALLY = Locally()


@dataclass(frozen=True, eq=False)
class ByFormula:
    """An alternative's formula (``flexclear.alternatives``), bound to the call's sequence."""

    formula: Attend

    def attend(
        self, own: SlotPlan, slot: int, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None
    ) -> Tensor:
        """See ``Means``."""
        return self.formula(query, key, value, weight)


class Band(Protocol):
    """One call in this process: attention of its own image tokens and of all text, and access to the other processes' tokens."""

    @property
    def ticket(self) -> Tensor:
        """The run's number, a 0-d tensor by which compiled blocks refer to it (``flexclear::band_attend``)."""

    def attend(
        self,
        mask: Any,
        slot: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of one layer, ``[B, heads, N, head_dim]`` in sequence order. N counts this process's image tokens and the
        text.

        Args:
            mask: mask of this process's image queries.
            slot: number of the layer's plan.
            query, key, value: after norms and rotary embedding.
            weight: pooling weights, or None.
            scale: factor on the scores.
        """

    def gather(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Gather the image tokens of all processes into those of the whole image, in raster order along ``dim``."""


@dataclass(frozen=True, eq=False)
class InBand:
    """Softmax over a window, for this process's band of the image (``flexclear.parallel``)."""

    band: Band

    def attend(
        self, own: SlotPlan, slot: int, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None
    ) -> Tensor:
        """See ``Means``."""
        query, key, scale = own.scored(query, key)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if torch.compiler.is_compiling():
            return torch.ops.flexclear.band_attend(query, key, value, weight, self.band.ticket, slot, scale)
        return self.band.attend(own.mask, slot, query, key, value, weight, scale)


@dataclass(frozen=True, eq=False)
class CallPlan:
    """Travels in the call's own arguments to every attention layer (``carrying``); the model stores nothing about a call.

    Attributes:
        base: token order, coordinates and layout of the joint sequence.
        slots: what each kind of layer needs.
        means: what computes attention.
        rotary: rotary embedding that replaces the model's own; None keeps the model's.
        embedder: replaces the module that makes the model's rotary embedding; returns it in the same form. None keeps the
            model's.
        dtype: dtype of the call's tokens.
    """

    base: Plan
    slots: tuple[SlotPlan, ...]
    means: Means = LOCALLY
    dtype: torch.dtype = torch.float32
    rotary: Rotary | None = None
    embedder: nn.Module | None = None

    @property
    def image_len(self) -> int:
        """Number of image tokens."""
        return self.base.layout.image_len

    @property
    def seq_len(self) -> int:
        """Number of tokens of the joint sequence."""
        return self.base.layout.seq_len

    @property
    def band(self) -> Band | None:
        """The call's ``Band`` if this process has only a part of the image, else None."""
        return self.means.band if isinstance(self.means, InBand) else None

    def sequence_tensors(self) -> tuple[Tensor, ...]:
        """Tensors of the plan, except masks, that have one row per token of the joint sequence."""
        return () if self.rotary is None else self.rotary

    def to_image_order(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Raster tokens into the layout's order along ``dim``."""
        return self.base.to_image_order(tokens, dim)

    def to_raster(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Tokens in the layout's order back into raster order along ``dim``; on several ranks, those of the whole image."""
        band = self.band
        return self.base.to_raster(tokens, dim) if band is None else band.gather(tokens, dim)

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None = None) -> Tensor:
        """Attention of one layer; see ``Means``.

        Args:
            slot: number of the layer's part of the plan.
            query, key, value: ``[B, heads, N, head_dim]`` in sequence order, after norms and rotary embedding; key and value
                may have fewer heads, each of which serves a run of query heads.
            weight: see ``Means``.
        """
        return self.means.attend(self.slots[slot], slot, query, key, value, weight)


def ordered(tokens: Tensor, order: Tensor) -> Tensor:
    """``[B, N, heads, head_dim]`` in another order, the same for all samples or one per sample; see ``SlotPlan.order``."""
    if order.ndim == 1:
        return tokens.index_select(1, order)
    return tokens.gather(1, order[:, :, None, None].expand_as(tokens))
