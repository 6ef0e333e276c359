"""Wan 2.1 and 2.2, VACE, and SkyReels V2: self-attention over the video's tokens, and cross-attention to text and image."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexclear.families.latents import LatentsFamily
from flexclear.masks.defaults import independent
from flexclear.runtime.facts import Call
from flexclear.runtime.grid import GridReader

CAUSAL = (
    "its attention is causal over blocks of {} frames (num_frame_per_block, causal_block_size of the pipeline), by a mask of "
    "every pair of tokens. Windows are not causal: call the pipeline with ar_step=0 and no causal_block_size, or restore(model)"
)


@dataclass(frozen=True)
class WanFamily(LatentsFamily):
    """``WanTransformer3DModel`` and similar models. There may be a timestep per token (Wan 2.2 TI2V); timesteps and tokens are
    in raster order.
    """

    def read(self, model: Any, kwargs: dict[str, Any], grids: GridReader) -> Call:
        blocks = getattr(model.config, "num_frame_per_block", 1)
        if blocks > 1:
            raise ValueError(f"this transformed {type(model).__name__} cannot be called: {CAUSAL.format(blocks)}")
        return super().read(model, kwargs, grids)

    def stretched(self, model: nn.Module, factor: float) -> Any:
        embedder: Any = self.embedder_of(model)
        kind: Any = type(embedder)
        return _stretched(
            kind,
            embedder.attention_head_dim,
            tuple(embedder.patch_size),
            embedder.max_seq_len,
            THETA * factor,
            embedder.freqs_cos.device,
        )


THETA = 10000.0
"""Base of the frequencies; the embedding keeps only tables, not the base."""


@functools.lru_cache(maxsize=8)
@independent
def _stretched(
    kind: Any, head_dim: int, patch: tuple[int, ...], longest: int, theta: float, device: torch.device
) -> nn.Module:
    """A rotary embedding with tables for another base."""
    return kind(head_dim, patch, longest, theta).to(device)


WAN = WanFamily(
    model_class="WanTransformer3DModel",
    processors=("WanAttnProcessor",),
    stacks={"blocks": "attn1"},
    carriers=("rope",),
    joins=False,
    video=True,
    rows=1,
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    notes=(
        "Wan 2.1 and 2.2, text, image and video to video, a timestep per token (TI2V), both transformers of the A14B; "
        "cross-attention to text and image is unchanged"
    ),
)

WAN_VACE = WanFamily(
    model_class="WanVACETransformer3DModel",
    processors=("WanAttnProcessor",),
    stacks={"vace_blocks": "attn1", "blocks": "attn1"},
    carriers=("rope",),
    joins=False,
    video=True,
    pipelines=("WanVACEPipeline",),
    notes="blocks of the control video have the same window",
)

SKYREELS_V2 = WanFamily(
    model_class="SkyReelsV2Transformer3DModel",
    processors=("SkyReelsV2AttnProcessor",),
    stacks={"blocks": "attn1"},
    carriers=("rope",),
    joins=False,
    video=True,
    rows=1,
    pipelines=(
        "SkyReelsV2Pipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    notes="a timestep per frame (diffusion forcing); its causal attention over blocks of frames is refused",
)
