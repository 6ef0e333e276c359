"""Windowed attention processor for Qwen-Image's attention modules; imported when such a model is transformed."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor

from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.modes import known_to_hooks
from flexclear.runtime.processors import WindowProcessor, rotate


class QwenWindowProcessor(WindowProcessor):
    """Attention of a Qwen-Image block under the plan's window and text padding; the rest as in diffusers' own processor."""

    def __init__(self, slot: int | None = None) -> None:
        self.slot = slot

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        flexclear_plan: CallPlan | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Shapes: image ``[B, N, C]``, text ``[B, T, C]``. Padded text is masked by the plan, so that
        ``encoder_hidden_states_mask`` has nothing to add; rotary tables are the plan's, in its order, in the place of
        ``image_rotary_emb``.

        Returns:
            Image and text, shaped as they came.

        Raises:
            ValueError: no plan: the block was called without the model's entry, where windows are made.
        """
        head_dim = attn.inner_dim // attn.heads
        # Without a plan attend raises.
        image_tables, text_tables = (None, None) if flexclear_plan is None else flexclear_plan.rotary
        text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        image = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        parts = zip(
            _projected(encoder_hidden_states, *text, head_dim, text_tables),
            _projected(hidden_states, *image, head_dim, image_tables),
            strict=True,
        )
        query, key, value = (torch.cat(part, dim=1) for part in parts)
        out = self.attend(flexclear_plan, query, key, value)
        text_len = encoder_hidden_states.shape[1]
        image_out = out[:, text_len:].contiguous()
        for layer in attn.to_out:
            image_out = layer(image_out)
        return image_out, attn.to_add_out(out[:, :text_len].contiguous())


known_to_hooks(QwenWindowProcessor, QwenDoubleStreamAttnProcessor2_0)


def _projected(
    tokens: Tensor,
    to_query: Any,
    to_key: Any,
    to_value: Any,
    norm_query: Any,
    norm_key: Any,
    head_dim: int,
    tables: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one stream after norms and RoPE, ``[B, tokens, heads, head_dim]``."""
    query, key, value = (layer(tokens).unflatten(-1, (-1, head_dim)) for layer in (to_query, to_key, to_value))
    if norm_query is not None:
        query = norm_query(query)
    if norm_key is not None:
        key = norm_key(key)
    if tables is not None:
        cos, sin = (table.unsqueeze(1) for table in tables)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    return query, key, value
