"""GLM-Image: CogView4's blocks, with prior tokens and caches of the keys and values of condition images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flexclear.families.latents import ADDED_MASK, OWN_ROTARY, LatentsFamily
from flexclear.runtime.facts import Call
from flexclear.runtime.grid import GridReader


@dataclass(frozen=True)
class GlmImageFamily(LatentsFamily):
    """``GlmImageTransformer2DModel``. Its pipeline passes caches in every call; without condition images they do nothing."""

    def read(self, model: Any, kwargs: dict[str, Any], grids: GridReader) -> Call:
        caches = kwargs.get("kv_caches")
        modes = [] if caches is None else [caches[number].mode for number in range(len(model.transformer_blocks))]
        for mode in ("write", "read"):
            if mode in modes:
                raise ValueError(
                    f"kv_caches of a {type(model).__name__} in mode {mode!r}: the keys and values of condition images, in "
                    "front of the text, for which there is no window. Call the pipeline without images, or "
                    "flexclear.restore(model) first"
                )
        return super().read(model, kwargs, grids)


GLM_IMAGE = GlmImageFamily(
    model_class="GlmImageTransformer2DModel",
    processors=("GlmImageAttnProcessor",),
    stacks={"transformer_blocks": "attn1"},
    carriers=("rope",),
    refuses={"attention_mask": ADDED_MASK, "image_rotary_emb": OWN_ROTARY},
    pipelines=("GlmImagePipeline",),
    notes="text to image; condition images raise: their keys and values are cached, without a window",
)
