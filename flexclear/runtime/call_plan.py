"""What one call of a transformed model hands to its attention layers: one mask per kind of layer, and the token order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_leaves

from flexclear.runtime.attention import windowed_attention
from flexclear.runtime.mechanism import Attend
from flexclear.runtime.plan import Plan
from flexclear.runtime.pooling import Pooling


class Band(Protocol):
    """One call in this process: attention of its image tokens and of all text, and what the others have."""

    @property
    def ticket(self) -> Tensor:
        """The run's number, a 0-d tensor: what a compiled block names it by (``flexclear::band_attend``)."""

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
        """Attention of one layer, ``[B, heads, N, head_dim]`` in sequence order, N this process's image tokens and the text.

        Args:
            mask: of its image queries.
            slot: which plan is the layer's.
            query, key, value: after norms and rotary embedding.
            weight: pooling weights, or None.
            scale: factor on the scores.
        """

    def gather(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """This process's image tokens into those of the whole image, in raster order along ``dim``."""


@dataclass(frozen=True, eq=False)
class CallPlan:
    """Travels in the call's own arguments to every attention layer; the model itself holds nothing of a call.

    Attributes:
        base: token order, coordinates and layout of the joint sequence.
        masks: mask of each slot (``flexclear.runtime.facts.Slot``): a BlockMask, a dense bool mask, or None: dense attention.
        poolings: where each slot's pooled keys come from, or None.
        rotary: rotary embedding in sequence order that replaces the model's own; None keeps the model's.
        gains: 0-d factor on the queries of each slot (proportional attention), or None.
        formula: what attends in place of softmax over a mask (``flexclear.alternatives``), bound to this call; or None.
        band: what attends and gathers where this process has a band of the picture (``flexclear.parallel``), or None.
        ntk_floor: least share of its own frequency that a rotary axis keeps; see ``flexclear.override``.
    """

    base: Plan
    masks: tuple[BlockMask | Tensor | None, ...]
    poolings: tuple[Pooling | None, ...]
    rotary: Any = None
    gains: tuple[Tensor, ...] | None = None
    formula: Attend | None = None
    ntk_floor: float = 0.0

    band: Band | None = None

    @property
    def image_len(self) -> int:
        """Number of image tokens."""
        return self.base.layout.image_len

    @property
    def seq_len(self) -> int:
        """Number of tokens of the joint sequence."""
        return self.base.layout.seq_len

    def sequence_tensors(self) -> list[Tensor]:
        """Tensors of the plan with one row per token of the joint sequence, apart from the masks."""
        return [tensor for tensor in tree_leaves(self.rotary) if isinstance(tensor, Tensor)]

    def to_image_order(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Raster tokens into the layout's order along ``dim``."""
        return self.base.to_image_order(tokens, dim)

    def to_raster(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Tokens in the layout's order back into raster order along ``dim``; on several ranks, the whole picture's."""
        if self.band is not None:
            return self.band.gather(tokens, dim)
        return self.base.to_raster(tokens, dim)

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None = None) -> Tensor:
        """Attention of one layer, ``[B, heads, N, head_dim]`` in sequence order.

        Args:
            slot: which mask is the layer's.
            query, key, value: after norms and rotary embedding.
            weight: pooling weights of a layer with down-sampled keys (method, section 4) or of a formula, else None.
        """
        if self.formula is not None:
            return self.formula(query, key, value, weight)
        if self.gains is not None:
            query = (query.float() * self.gains[slot]).to(query.dtype)
        pooling = self.poolings[slot]
        if pooling is not None and weight is not None and self.band is None:
            key, value = pooling.append(key, weight), pooling.append(value, weight)
        return self.softmax(slot, query, key, value, weight)

    def softmax(
        self,
        slot: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Softmax attention over the slot's mask, of this process's queries; arguments as in ``attend``."""
        if self.band is not None:
            if torch.compiler.is_compiling():
                return torch.ops.flexclear.band_attend(query, key, value, weight, self.band.ticket, slot, scale)
            return self.band.attend(self.masks[slot], slot, query, key, value, weight, scale)
        return windowed_attention(query, key, value, self.masks[slot], scale)
