"""Windowed attention processors for FLUX.2's attention modules; imported when a FLUX.2 model is transformed."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from flexclear.families.flux_attention import FluxWindowProcessor
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.processors import WindowProcessor


class Flux2WindowProcessor(FluxWindowProcessor):
    """Double-stream blocks: the modules and the arithmetic are those of FLUX.1, fused projections included."""


class Flux2ParallelWindowProcessor(WindowProcessor):
    """Single-stream blocks, whose first layer makes queries, keys, values and the MLP's input at once."""

    def __init__(self, slot: int | None = None) -> None:
        self.slot = slot

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        flexclear_plan: CallPlan | None = None,
    ) -> Tensor:
        """Text and image in ``hidden_states``, ``[B, T + N, C]``, and so the output.

        Raises:
            ValueError: no plan: the block was called without the model's entry, where windows are made.
        """
        projected = attn.to_qkv_mlp_proj(hidden_states)
        # By ratio, not by size: under tensor parallelism every rank holds its share of each part.
        attention_share, mlp_share = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        split = projected.shape[-1] * attention_share // (attention_share + mlp_share)
        mlp = projected[..., split:]
        query, key, value = (t.unflatten(-1, (-1, attn.head_dim)) for t in projected[..., :split].chunk(3, dim=-1))
        query, key = attn.norm_q(query), attn.norm_k(key)
        rotary = image_rotary_emb if flexclear_plan is None else flexclear_plan.rotary or image_rotary_emb
        if rotary is not None:
            query = apply_rotary_emb(query, rotary, sequence_dim=1)
            key = apply_rotary_emb(key, rotary, sequence_dim=1)
        seen = self.attend(flexclear_plan, query, key, value)
        return attn.to_out(torch.cat([seen, attn.mlp_act_fn(mlp)], dim=-1))
