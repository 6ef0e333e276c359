"""The windowed attention processor of SD3's blocks, and the hook that puts their tokens in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.hooks import Hook
from flexclear.runtime.processors import PLAN, WindowProcessor


class OrderHook(Hook):
    """Forward pre-hook of the first block: image tokens, which have their positions by now, into the plan's order.

    Blocks are called by name, and by position (image, text, embedding, attention arguments) under gradient checkpointing.
    """

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        attention_kwargs = args[3] if len(args) > 3 else kwargs.get("joint_attention_kwargs")
        plan: CallPlan | None = (attention_kwargs or {}).get(PLAN)
        if plan is None:
            return args, kwargs  # the block alone: its attention says what is missing
        if args:
            return (plan.to_image_order(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": plan.to_image_order(kwargs["hidden_states"])}


class GatherHook(Hook):
    """Forward hook of the last layer before patches become a picture: the tokens of all ranks, in raster order."""

    after = True

    def __init__(self, current: Any) -> None:
        self.current = current

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        call = self.current()
        return output if call is None else call.gather(output)


class SD3WindowProcessor(WindowProcessor):
    """Attention of an SD3 block under the plan's window; projections and norms as in diffusers' own processor.

    Args:
        slot: see ``WindowProcessor``.
        fused: whether to project with the matrices that ``fuse_qkv_projections`` makes. The norms of query and key are
            applied in either case; diffusers' own fused processor leaves them out.
    """

    def __init__(self, slot: int | None = None, fused: bool = False) -> None:
        self.slot = slot
        self.fused = fused

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        flexclear_plan: CallPlan | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Shapes: image ``[B, N, C]``, text ``[B, T, C]``; no text in image-only attention.

        Raises:
            ValueError: no plan: the block was called without the model's entry, where windows are made.
        """
        query, key, value = self._heads(attn, hidden_states, "to_qkv", ("to_q", "to_k", "to_v"))
        query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
        if encoder_hidden_states is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            text_query, text_key, text_value = self._heads(attn, encoder_hidden_states, "to_added_qkv", names)
            query = torch.cat([query, _normed(attn.norm_added_q, text_query)], dim=1)
            key = torch.cat([key, _normed(attn.norm_added_k, text_key)], dim=1)
            value = torch.cat([value, text_value], dim=1)
        out = self.attend(flexclear_plan, query, key, value)
        image_len = hidden_states.shape[1]
        image_out = attn.to_out[1](attn.to_out[0](out[:, :image_len]))
        if encoder_hidden_states is None:
            return image_out
        text_out = out[:, image_len:]
        return image_out, text_out if attn.context_pre_only else attn.to_add_out(text_out)

    def _heads(self, attn: Any, tokens: Tensor, fused: str, names: tuple[str, str, str]) -> list[Tensor]:
        """Query, key and value of ``tokens``, ``[B, N, heads, head_dim]``."""
        if self.fused:
            projected = list(getattr(attn, fused)(tokens).chunk(3, dim=-1))
        else:
            projected = [getattr(attn, name)(tokens) for name in names]
        return [tensor.unflatten(-1, (attn.heads, -1)) for tensor in projected]


def _normed(norm: nn.Module | None, tensor: Tensor) -> Tensor:
    return tensor if norm is None else norm(tensor)
