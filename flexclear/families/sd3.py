"""SD3 and SD3.5: the image first, text last; positions are added to the tokens, not rotary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from flexclear.families.checks import attention_of, refuse_mask, required_tensor
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.family import Family
from flexclear.runtime.grid import GridReader
from flexclear.runtime.processors import PLAN

IMAGE = "image"
"""Scope of the second attention of SD3.5 medium's blocks, which sees no text."""

PX_PER_LATENT = 8
"""Pixels per latent and side of the VAE that SD3 and SD3.5 have."""


class SD3Family(Family):
    """``SD3Transformer2DModel``."""

    model_class = "SD3Transformer2DModel"
    text_first = False
    rope = False
    pipelines = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
    )
    notes = (
        "SD3 and SD3.5, with SD3.5 medium's image-only attention and skip_guidance_layers; sizes up to the model's position "
        "embedding; no IP-Adapter"
    )

    def layers(self, model: nn.Module) -> Iterator[Layer]:
        from diffusers.models.attention_processor import (
            Attention,
            FusedJointAttnProcessor2_0,
            JointAttnProcessor2_0,
            SD3IPAdapterJointAttnProcessor2_0,
        )

        found = 0
        replaced = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0)
        for index, block in enumerate(getattr(model, "transformer_blocks", ())):
            names = ("attn", "attn2") if getattr(block, "use_dual_attention", False) else ("attn",)
            for name in names:
                where = f"transformer_blocks[{index}]"
                present = getattr(getattr(block, name, None), "processor", None)
                if isinstance(present, SD3IPAdapterJointAttnProcessor2_0):
                    raise TypeError(
                        f"{where}.{name} has SD3's IP-Adapter, a second attention of the image over itself and the "
                        "adapter's image, for which there is no window yet. Load the pipeline without it, then transform"
                    )
                attn = attention_of(model, block, where, name, Attention, replaced)
                found += 1
                yield Layer(f"transformer_blocks.{index}.{name}", attn, JOINT if name == "attn" else IMAGE)
        if not found:
            raise ValueError(f"this {type(model).__name__} has no blocks in transformer_blocks: nothing to transform")

    def processor(self, layer: Layer, original: Any, slot: int, down_factor: int | None) -> Any:
        from diffusers.models.attention_processor import FusedJointAttnProcessor2_0

        from flexclear.families.sd3_attention import SD3WindowProcessor

        return SD3WindowProcessor(slot, fused=isinstance(original, FusedJointAttnProcessor2_0))

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        latents, text = (required_tensor(kwargs, name, model) for name in ("hidden_states", "encoder_hidden_states"))
        refuse_mask(kwargs.get("joint_attention_kwargs") or {}, "joint_attention_kwargs")
        grid = _grid(model, latents)
        for residual in kwargs.get("block_controlnet_hidden_states") or ():
            if residual.shape[1] != grid[0] * grid[1]:
                raise ValueError(
                    f"block_controlnet_hidden_states of shape {tuple(residual.shape)} do not fit latents of "
                    f"{grid[0]} x {grid[1]} = {grid[0] * grid[1]} tokens"
                )
        # Tokens are permuted where the first block begins. When that block is skipped, they stay in raster order.
        order = "raster" if 0 in (kwargs.get("skip_layers") or ()) else None
        return Call(latents, (grid,), {JOINT: text.shape[1], IMAGE: 0}, order=order)

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, ntk_factor: float
    ) -> dict[str, Any]:
        if ntk_factor != 1:
            raise ValueError(f"ntk_factor={ntk_factor}: {type(model).__name__} has no rotary positions")
        changed = dict(kwargs)
        residuals = kwargs.get("block_controlnet_hidden_states")
        if residuals is not None:
            changed["block_controlnet_hidden_states"] = [plan.to_image_order(residual) for residual in residuals]
        changed["joint_attention_kwargs"] = {**(kwargs.get("joint_attention_kwargs") or {}), PLAN: plan}
        return changed

    def inner_hooks(self, model: nn.Module) -> list[tuple[nn.Module, Any]]:
        from flexclear.families.sd3_attention import OrderHook

        blocks: Any = model.transformer_blocks
        return [(blocks[0], OrderHook())]

    def why_not_parallel_call(self, model: nn.Module, kwargs: dict[str, Any]) -> str | None:
        if 0 in (kwargs.get("skip_layers") or ()):
            return "it skips the first block (skip_layers), where tokens are shared out"
        return None

    def parallel_hooks(self, model: nn.Module, current: Any) -> list[tuple[nn.Module, Any]]:
        from flexclear.families.sd3_attention import GatherHook

        out: Any = model.proj_out
        return [(out, GatherHook(current))]

    def plan_of(self, kwargs: dict[str, Any]) -> CallPlan:
        return kwargs["joint_attention_kwargs"][PLAN]

    def leave(self, model: nn.Module, output: Any, plan: CallPlan) -> Any:
        patch = _patch_size(model)
        if isinstance(output, tuple):
            return (_to_raster(output[0], patch, plan), *output[1:])
        output.sample = _to_raster(output.sample, patch, plan)
        return output


def _patch_size(model: nn.Module) -> int:
    config: Any = model.config
    return config.patch_size


def _grid(model: nn.Module, latents: Tensor) -> tuple[int, int]:
    """Height and width in tokens of latents ``[B, C, H, W]``.

    Raises:
        ValueError: they have another shape, or are larger than the model's position embedding.
    """
    patch = _patch_size(model)
    if latents.ndim != 4 or min(latents.shape[-2:]) < patch:
        raise ValueError(
            f"a transformed {type(model).__name__} takes latents of shape [batch, channels, height, width] with sides of "
            f"{patch} or more, got {tuple(latents.shape)}"
        )
    height, width = (side // patch for side in latents.shape[-2:])
    embed: Any = model.pos_embed
    most = embed.pos_embed_max_size
    if most is not None and max(height, width) > most:
        token = patch * PX_PER_LATENT
        raise ValueError(
            f"latents of shape {tuple(latents.shape)} are {height} x {width} tokens ({height * token} x {width * token} px), "
            f"but the position embedding of this {type(model).__name__} ends at {most} x {most} tokens "
            f"({most * token} x {most * token} px; pos_embed_max_size={most}). Choose a smaller picture; a window does not "
            "extend positions"
        )
    return height, width


def _to_raster(picture: Tensor, patch: int, plan: CallPlan) -> Tensor:
    """Patches of a picture ``[B, C, H, W]``, which lie in the plan's order, back at their places."""
    if plan.base.inverse is None:
        return picture
    channels, rows, columns = (picture.shape[1], picture.shape[2] // patch, picture.shape[3] // patch)
    patches = picture.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # [B, C, h, p, w, p]
    tokens = plan.to_raster(patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2))  # [B, h w, C, p, p]
    patches = tokens.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(picture), channels, rows * patch, columns * patch)
