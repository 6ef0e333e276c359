"""Chroma: FLUX's two stacks of blocks without guidance, and a mask for text padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.flux import PROCESSORS, RESIDUALS, STACKS, WITHOUT_IMAGES
from flexclear.families.tokens import TokensFamily, kept_text
from flexclear.masks.lengths import mark_symbolic
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.facts import JOINT, Call
from flexclear.runtime.grid import GridReader
from flexclear.runtime.switches import Switches


@dataclass(frozen=True)
class ChromaFamily(TokensFamily):
    """``ChromaTransformer2DModel``.

    ``attention_mask``, ``[B, text + image]``, has the same meaning as in the model. A bool mask hides padding. A floating-point
    mask, as diffusers' own pipelines make it, is added to the scores (kept pairs get 1 more than others), which needs a wider
    kernel. In a pipeline, ``prompt_attention_mask=mask.bool()`` hides padding.
    """

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        call = super().read(model, kwargs, grids)
        keep = _keep(kwargs.get("attention_mask"), kwargs[self.text], call.tokens, grids)
        return call if keep is None else replace(call, keep={JOINT: keep})

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, switches: Switches
    ) -> tuple[dict[str, Any], CallPlan]:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.is_floating_point():
            text_len = kwargs[self.text].shape[1]
            bias = torch.cat([mask[:, :text_len], plan.to_image_order(mask[:, text_len:])], dim=1)
            mark_symbolic(bias, [1])
            plan = replace(plan, slots=tuple(replace(slot, bias=bias) for slot in plan.slots))
        # The plan has the mask; every block would expand it to [B, 1, N, N].
        return super().enter(model, {**kwargs, "attention_mask": None}, plan, exact_ids, switches)


def _keep(mask: Any, text: Tensor, tokens: Tensor, reader: GridReader) -> Tensor | None:
    """Which text tokens a call's ``attention_mask`` keeps, bool ``[B, text_len]``; None if it is added to scores or keeps all.

    Raises:
        ValueError: it is not a mask of the call's tokens, or hides image tokens.
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
    return kept_text(mask, "attention_mask", text, tokens, reader)


CHROMA = ChromaFamily(
    model_class="ChromaTransformer2DModel",
    processors=PROCESSORS,
    stacks=STACKS,
    carrier_argument="joint_attention_kwargs",
    carriers=("pos_embed",),  # checkpointed blocks do not get that argument
    given=WITHOUT_IMAGES,
    residuals=RESIDUALS,
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline"),
    notes="text padding masks, bool ones fastest; IP-Adapter; gradient checkpointing",
)
