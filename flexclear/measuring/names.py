"""Models that ``flexclear bench`` knows by name. Does not import torch, so that a mistyped name fails at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Published:
    """A published transformer.

    Attributes:
        model_class: its class in diffusers.
        config: settings that differ from the class's defaults.
        text_len: number of text tokens that its pipeline pads or truncates to.
        px: pixels per token and side; None: the family's.
    """

    model_class: str
    config: dict[str, Any] = field(default_factory=dict)
    text_len: int = 512
    px: int | None = None


SD35_LARGE: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
    "pos_embed_max_size": 192,
}

CONFIGS = {
    "flux.1-dev": Published("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux.1-schnell": Published("FluxTransformer2DModel", {"guidance_embeds": False}, 256),
    "flux.2-dev": Published("Flux2Transformer2DModel"),
    "sd3.5-large": Published("SD3Transformer2DModel", SD35_LARGE, 333),
    "qwen-image": Published("QwenImageTransformer2DModel"),
}
"""By name."""
