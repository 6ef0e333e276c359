"""Transformers of published models with fake weights on ``cuda:0``, and calls as their pipelines make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fakegpu.host import CUDA, MODE, known

BFLOAT16 = torch.bfloat16
TEXT = 512
"""Text tokens of a call, FLUX's number."""

PIXELS = 16
"""Pixels on a side of an image token."""

CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "FLUX.1-dev": (
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 4, "joint_attention_dim": 256},
    ),
    "FLUX.2-dev": (
        "Flux2Transformer2DModel",
        {},
        {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 4, "joint_attention_dim": 512},
    ),
    "SD3.5-large": (
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 38,
            "attention_head_dim": 64,
            "num_attention_heads": 38,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 2432,
            "pooled_projection_dim": 2048,
            "out_channels": 16,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        {"num_layers": 3, "num_attention_heads": 4, "caption_projection_dim": 256},
    ),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}, {"num_layers": 3, "num_attention_heads": 4}),
}
"""Class, configuration where it differs from the class's defaults, and what a tiny one of the same head dims has instead."""


def build(name: str, tiny: bool = False, device: torch.device = CUDA) -> nn.Module:
    """The transformer in bfloat16, frozen; its weights have no values."""
    import diffusers

    kind, published, small = CONFIGS[name]
    make = getattr(diffusers, kind)  # imports, which make tensors, before there is a mode
    before = torch.get_default_dtype()
    torch.set_default_dtype(BFLOAT16)
    try:
        with MODE, device:
            model = make(**{**published, **(small if tiny else {})})
    finally:
        torch.set_default_dtype(before)
    if any(parameter.dtype is not BFLOAT16 for parameter in model.parameters()):
        with MODE:
            model.to(BFLOAT16)
    return model.eval().requires_grad_(False)


def largest(name: str) -> int | None:
    """Pixels on the longest side that the model's positions reach; None: any."""
    reach = CONFIGS[name][1].get("pos_embed_max_size")
    return None if reach is None else reach * PIXELS


def call(name: str, model: nn.Module, height: int, width: int, text: int = TEXT) -> dict[str, Any]:
    """Arguments of one step for a grid of ``height`` x ``width`` tokens, one image."""
    with MODE:
        return CALLS[name](model.config, height, width, text)


def _new(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=CUDA)


def _positions(height: int, width: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Known ids (index, row, column, ...) in raster order, ``[..., axes]`` of a shape."""
    with _disable_current_modes():
        ids = torch.zeros(height, width, shape[-1])
        ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
        return known(ids.view(shape).to(dtype))


def _flux(config: Any, height: int, width: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": _new(1, height * width, config.in_channels),
        "encoder_hidden_states": _new(1, text, config.joint_attention_dim),
        "pooled_projections": _new(1, config.pooled_projection_dim),
        "timestep": _new(1),
        "guidance": _new(1, dtype=torch.float32),
        "img_ids": _positions(height, width, -1, 3, dtype=torch.float32),
        "txt_ids": torch.zeros(text, 3, dtype=BFLOAT16, device=CUDA),
        "return_dict": False,
    }


def _flux2(config: Any, height: int, width: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": _new(1, height * width, config.in_channels),
        "encoder_hidden_states": _new(1, text, config.joint_attention_dim),
        "timestep": _new(1),
        "guidance": _new(1),
        "img_ids": _positions(height, width, 1, -1, 4, dtype=torch.int64),
        "txt_ids": torch.zeros(1, text, 4, dtype=torch.int64, device=CUDA),
        "return_dict": False,
    }


def _sd3(config: Any, height: int, width: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": _new(1, config.in_channels, config.patch_size * height, config.patch_size * width),
        "encoder_hidden_states": _new(1, text, config.joint_attention_dim),
        "pooled_projections": _new(1, config.pooled_projection_dim),
        "timestep": _new(1, dtype=torch.float32),
        "return_dict": False,
    }


def _qwen(config: Any, height: int, width: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": _new(1, height * width, config.in_channels),
        "encoder_hidden_states": _new(1, text, config.joint_attention_dim),
        "encoder_hidden_states_mask": None,
        "timestep": _new(1),
        "img_shapes": [[(1, height, width)]],
        "return_dict": False,
    }


CALLS: dict[str, Callable[[Any, int, int, int], dict[str, Any]]] = {
    "FLUX.1-dev": _flux,
    "FLUX.2-dev": _flux2,
    "SD3.5-large": _sd3,
    "Qwen-Image": _qwen,
}
