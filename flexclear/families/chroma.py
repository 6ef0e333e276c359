"""Chroma: FLUX's two stacks of blocks without guidance, and a mask for the padding of the text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexclear.families.checks import refuse_mask, required_tensor
from flexclear.families.flux import check_residuals, check_tokens, flux_layers, permuted, with_ntk
from flexclear.masks.lengths import mark_symbolic
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.family import Family
from flexclear.runtime.grid import GridReader
from flexclear.runtime.processors import PLAN


@dataclass(frozen=True, eq=False)
class BiasedPlan(CallPlan):
    """A plan under which every score gets a term of its own, the product of two numbers.

    Attributes:
        bias: ``[B, N]`` or ``[1, N]`` in sequence order: the score of query i and key j grows by ``bias[i] * bias[j]``.
    """

    bias: Tensor | None = None

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None = None) -> Tensor:
        """See ``CallPlan.attend``. The product is one more channel of query and key, beside a few empty ones."""
        assert self.bias is not None
        scale = 1 / math.sqrt(query.shape[-1])
        if self.gains is not None:
            query = (query.float() * self.gains[slot]).to(query.dtype)
        channel = self.bias.to(query.dtype)[:, None, :, None].expand(*query.shape[:3], 1)
        channel = F.pad(channel, (0, -(query.shape[-1] + 1) % 8))
        query, key = torch.cat([query, channel / scale], dim=-1), torch.cat([key, channel], dim=-1)
        return self.softmax(slot, query, key, value, scale=scale)


class ChromaFamily(Family):
    """``ChromaTransformer2DModel``.

    ``attention_mask``, ``[B, text + image]``, is taken as the model takes it: a bool mask hides padding; a mask of
    floating-point numbers, such as diffusers' own pipelines make of it, is added to the scores (kept pairs get 1 more than
    others), and that needs a wider kernel. ``prompt_attention_mask=mask.bool()`` hides padding in a pipeline.
    """

    model_class = "ChromaTransformer2DModel"
    text_first = True
    pipelines = ("ChromaPipeline", "ChromaImg2ImgPipeline")
    notes = "text padding masks, bool ones fastest; IP-Adapter; gradient checkpointing"

    def layers(self, model: nn.Module) -> Iterator[Layer]:
        return flux_layers(model)

    def processor(self, layer: Layer, original: Any, slot: int, down_factor: int | None) -> Any:
        from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

        from flexclear.families import chroma_attention

        if isinstance(original, FluxIPAdapterAttnProcessor):
            return chroma_attention.ChromaIPWindowProcessor(slot, original)
        return chroma_attention.ChromaWindowProcessor(slot)

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        tokens, text, ids = (
            required_tensor(kwargs, name, model) for name in ("hidden_states", "encoder_hidden_states", "img_ids")
        )
        refuse_mask(kwargs.get("joint_attention_kwargs") or {}, "joint_attention_kwargs")
        found = grids(ids)
        check_tokens(model, kwargs, found)
        check_residuals(kwargs)
        keep = _keep(kwargs.get("attention_mask"), text, tokens, grids)
        return Call(tokens, found, {JOINT: text.shape[1]}, {} if keep is None else {JOINT: keep})

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, ntk_factor: float
    ) -> dict[str, Any]:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.is_floating_point():
            text_len = kwargs["encoder_hidden_states"].shape[1]
            bias = torch.cat([mask[:, :text_len], plan.to_image_order(mask[:, text_len:])], dim=1)
            mark_symbolic(bias, [1])
            plan = BiasedPlan(**{field.name: getattr(plan, field.name) for field in fields(plan)}, bias=bias)
        changed = with_ntk(model, permuted(kwargs, plan, exact_ids), ntk_factor)
        # The plan has it; every block would make [B, 1, N, N] of it.
        changed["attention_mask"] = None
        if getattr(model, "gradient_checkpointing", False) and torch.is_grad_enabled():
            from flexclear.families.chroma_attention import carrying

            changed["img_ids"] = carrying(self.plan_of(changed), changed["img_ids"])
        return changed

    def inner_hooks(self, model: nn.Module) -> list[tuple[nn.Module, Any]]:
        from flexclear.families.chroma_attention import RotaryHook

        embed: Any = model.pos_embed
        return [(embed, RotaryHook())]

    def plan_of(self, kwargs: dict[str, Any]) -> CallPlan:
        return kwargs["joint_attention_kwargs"][PLAN]


def _keep(mask: Any, text: Tensor, tokens: Tensor, reader: GridReader) -> Tensor | None:
    """Which text tokens a call's ``attention_mask`` keeps, bool ``[B, text_len]``; None where it is added to scores or
    keeps all.

    Raises:
        ValueError: it is no mask of the call's tokens, or hides image tokens.
    """
    if mask is None:
        return None
    batch, text_len, image_len = len(tokens), text.shape[1], tokens.shape[1]
    if (
        not isinstance(mask, Tensor)
        or not (mask.dtype == torch.bool or mask.is_floating_point())
        or mask.shape not in ((batch, text_len + image_len), (1, text_len + image_len))
    ):
        given = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(
            f"attention_mask must be a bool or floating-point tensor over batch, and text and image: "
            f"[{batch}, {text_len} + {image_len}], got {given}"
        )
    if mask.is_floating_point():
        return None
    last = reader.once(mask, _last_hidden)
    if last >= text_len:
        raise ValueError(
            f"attention_mask hides image tokens (the last one that it hides is number {last - text_len} of {image_len}). "
            "The window decides which image tokens are seen; the mask can only hide text"
        )
    return None if last < 0 else mask[:, :text_len].expand(batch, -1)


def _last_hidden(mask: Tensor) -> int:
    """The last token that a bool mask ``[B, N]`` hides in some sample, -1 if it hides none."""
    hidden = torch.nonzero((~mask).any(dim=0))[:, 0]
    return int(hidden[-1]) if len(hidden) else -1
