"""Krea 2: one stack over text and image with grouped key and value heads; the text always comes with a mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.tokens import TokensFamily
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.grid import GridReader
from flexclear.runtime.mechanism import Formula
from flexclear.runtime.processors import WindowProcessor

MASK = "encoder_attention_mask"


@dataclass(frozen=True)
class Krea2Family(TokensFamily):
    """``Krea2Transformer2DModel``.

    The blocks that fuse the text encoder's layers attend over text alone, and are unchanged.
    """

    def processor(
        self, layer: Layer, original: Any, slot: int, down_factor: int | None, formula: Formula | None
    ) -> WindowProcessor:
        processor = super().processor(layer, original, slot, down_factor, formula)
        # diffusers repeats key and value heads, for the SDPA kernels that take a mask.
        processor.groups = layer.module.num_heads // layer.module.num_kv_heads
        return processor

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        call = super().read(model, kwargs, grids)
        mask, shape = kwargs.get(MASK), kwargs[self.text].shape[:2]
        if mask is None:
            return call
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
            given = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(
                f"{MASK} must be a bool tensor of shape {tuple(shape)} (batch, text tokens), False for padding, got {given}"
            )
        return call if grids.all_true(mask) else replace(call, keep={JOINT: mask})


KREA2 = Krea2Family(
    model_class="Krea2Transformer2DModel",
    processors=("Krea2AttnProcessor",),
    stacks={"transformer_blocks": "attn"},
    carriers=("rotary_emb",),
    given={"attention_mask": None},
    ids="position_ids",
    joint_ids=True,
    embed="rotary_emb",
    attention_kwargs="attention_kwargs",
    pipelines=("Krea2Pipeline",),
    notes="grouped heads run natively in FlexAttention; padded text is masked; the blocks that fuse the text's layers stay dense",
)
