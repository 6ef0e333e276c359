"""HunyuanImage 2.1 and its refiner: the image first, then the padded text, joined with the text of quoted words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from flexclear.families.latents import LatentsFamily
from flexclear.runtime.checks import required_mask
from flexclear.runtime.facts import JOINT, Call
from flexclear.runtime.grid import GridReader

TEXTS = {"encoder_hidden_states": "encoder_attention_mask", "encoder_hidden_states_2": "encoder_attention_mask_2"}
"""Arguments with a text's features, each with the argument of its mask."""


@dataclass(frozen=True)
class HunyuanImageFamily(LatentsFamily):
    """``HunyuanImageTransformer2DModel``. Its refiner takes latents of one frame, ``[B, C, 1, H, W]``.

    In each sample the model joins its two texts: first the unpadded tokens of both, then the padding.
    """

    def read(self, model: Any, kwargs: dict[str, Any], grids: GridReader) -> Call:
        call = super().read(model, kwargs, grids)
        joined = model.context_embedder_2 is not None and kwargs.get("encoder_hidden_states_2") is not None
        masks = [required_mask(kwargs, name, text, model) for text, name in list(TEXTS.items())[: 2 if joined else 1]]
        text_len = sum(mask.shape[1] for mask in masks)
        call = replace(call, text_lens={JOINT: text_len})
        if all(grids.all_true(mask) for mask in masks):
            return call
        keep = masks[0].bool()
        if joined:
            lengths = sum(mask.bool().sum(1, keepdim=True) for mask in masks)
            keep = torch.arange(text_len, device=keep.device) < lengths
        return replace(call, keep={JOINT: keep})


HUNYUAN_IMAGE = HunyuanImageFamily(
    model_class="HunyuanImageTransformer2DModel",
    processors=("HunyuanImageAttnProcessor",),
    stacks={"transformer_blocks": "attn", "single_transformer_blocks": "attn"},
    carriers=("rope",),
    text_first=False,
    given={"attention_mask": None},
    px_per_token=32,
    latents_per_token=1,
    pipelines=("HunyuanImagePipeline", "HunyuanImageRefinerPipeline"),
    notes=(
        "HunyuanImage 2.1, its distilled form and its refiner; padded text is masked, also that of quoted words. No gradient "
        "checkpointing: diffusers 0.42.1 passes it keywords that it does not accept"
    ),
)
