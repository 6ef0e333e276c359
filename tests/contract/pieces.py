"""What rows of the table are made of: parts of calls, what is done to a model, refusals and reasons that several share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flexclear.alternatives import LinearAttention

from .row import Refused
from .shapes import Shape

POOLED = Refused("down_factor: down-sampled keys are defined for FluxTransformer2DModel", {"down_factor": 2})
FORMULAS = Refused("attention='linear' is defined for FluxTransformer2DModel", {"attention": LinearAttention()})
MASK_HELD = r"holds an attention_mask \(Tensor of shape"
NO_ADAPTER = "there is no IP-Adapter for it in diffusers"
NO_IDS = "positions come from sizes"
NO_FUSING = "its projections cannot be fused in diffusers"
FLUX_STACKS = {"transformer_blocks": "attn", "single_transformer_blocks": "attn"}
FLUX_BLOCK = {"num_layers": 1, "num_single_layers": 1}


def noise(*shape: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keep(shape: Shape) -> torch.Tensor:
    """Which text is no padding, bool ``[B, text_len]``."""
    return torch.arange(shape.text_len)[None] < torch.tensor(shape.kept)[:, None]


def image_len(shape: Shape) -> int:
    return sum(height * width for height, width in ((shape.height, shape.width), *shape.references))


def image_residuals(*names: str) -> Callable[[Shape], dict[str, Any]]:
    """Residuals of the image's tokens, two for each argument."""

    def make(shape: Shape) -> dict[str, Any]:
        return {name: [noise(shape.batch, image_len(shape), 32, seed=place) for place in range(2)] for name in names}

    return make


def stretch_theta(model, factor: float) -> None:
    model.pos_embed.theta *= factor


def fuse(model) -> None:
    """As diffusers does, or for a class that has no method for it, module by module."""
    if hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections()
        return
    for module in model.modules():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()


def with_mask(call: dict[str, Any], shape: Shape, name: str = "joint_attention_kwargs") -> dict[str, Any]:
    """A call with the mask of its padded text among the processors' arguments."""
    if shape.padding:
        mask = torch.cat([keep(shape), torch.ones(shape.batch, image_len(shape), dtype=torch.bool)], 1)
        call[name] = {"attention_mask": mask[:, None, None]}
    return call


def mask_among(name: str) -> Callable[[Shape], dict[str, Any]]:
    """A mask of the caller's own among the attention's arguments."""
    return lambda shape: {name: {"attention_mask": torch.ones(1, shape.text_len + image_len(shape))}}


def share(model) -> None:
    """Ask for the image to be shared by several ranks."""
    from flexclear import parallel

    parallel.enable(model)
