"""Bria FIBO: FLUX's two stacks, and a mask for the padding of the text among the processors' arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.flux import STACKS
from flexclear.families.tokens import TokensFamily, kept_text
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.facts import JOINT, Call
from flexclear.runtime.grid import GridReader
from flexclear.runtime.switches import Switches


@dataclass(frozen=True)
class FiboFamily(TokensFamily):
    """``BriaFiboTransformer2DModel``."""

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        mask, others = self.apart(kwargs)
        call = super().read(model, others, grids)
        if mask is None:
            return call
        batch, count = len(call.tokens), call.text_lens[JOINT] + call.tokens.shape[1]
        shapes = ((batch, 1, 1, count), (1, 1, 1, count))
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape not in shapes:
            given = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(
                f"the attention_mask in {self.attention_kwargs} must be a bool tensor of shape {shapes[0]} (batch, 1, 1, "
                f"text and image), True for what is no padding, got {given}"
            )
        where = f"the attention_mask in {self.attention_kwargs}"
        keep = kept_text(mask, where, kwargs[self.text], call.tokens, grids)
        return call if keep is None else replace(call, keep={JOINT: keep})

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, switches: Switches
    ) -> tuple[dict[str, Any], CallPlan]:
        return super().enter(model, self.apart(kwargs)[1], plan, exact_ids, switches)

    def apart(self, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The mask, or None, and the arguments without it."""
        given = dict(kwargs.get(self.attention_kwargs) or {})
        mask = given.pop("attention_mask", None)
        return mask, kwargs if mask is None else {**kwargs, self.attention_kwargs: given}


FIBO = FiboFamily(
    model_class="BriaFiboTransformer2DModel",
    processors=("BriaFiboAttnProcessor", "BriaAttnProcessor"),
    stacks=STACKS,
    carriers=("pos_embed",),
    latents_per_token=1,  # its pipelines count in pixels of a token
    pipelines=("BriaFiboPipeline", "BriaFiboEditPipeline"),
    notes="FIBO and FIBO Edit, whose reference images are further grids; padded text is masked",
)
