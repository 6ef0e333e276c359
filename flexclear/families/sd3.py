"""SD3 and SD3.5: the image first, text last; positions are added to the tokens, not rotary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexclear.families.sharing import GatherHook, OrderHook
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.checks import refuse_mask, required_tensor
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.family import Family, InnerHooks
from flexclear.runtime.grid import GridReader
from flexclear.runtime.mechanism import Formula
from flexclear.runtime.processors import WindowProcessor, window_processor
from flexclear.runtime.switches import Switches

IMAGE = "image"
"""Scope of the second attention of SD3.5 medium's blocks, which sees no text."""

PX_PER_LATENT = 8
"""Pixels per latent, along each side, of the VAE of SD3 and SD3.5."""


class FusedJointAttnProcessor:
    """diffusers' ``FusedJointAttnProcessor2_0`` with SD3.5's norms of query and key, which the original leaves out."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        def heads(tokens: Tensor, projection: Any, norm_query: Any, norm_key: Any) -> tuple[Tensor, Tensor, Tensor]:
            parts = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in projection(tokens).chunk(3, -1))
            query, key, value = parts
            return query if norm_query is None else norm_query(query), key if norm_key is None else norm_key(key), value

        parts = [heads(hidden_states, attn.to_qkv, attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            parts.append(heads(encoder_hidden_states, attn.to_added_qkv, attn.norm_added_q, attn.norm_added_k))
        query, key, value = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask).transpose(1, 2).flatten(2)
        image_len = hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](out[:, :image_len]))
        if encoder_hidden_states is None:
            return image
        text = out[:, image_len:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


@dataclass(frozen=True)
class SD3Family(Family):
    """``SD3Transformer2DModel``."""

    def attends(self, block: Any, name: str) -> bool:
        return name == "attn" or getattr(block, "use_dual_attention", False)

    def layers(self, model: nn.Module) -> Iterator[Layer]:
        for index, block in enumerate(getattr(model, "transformer_blocks", ())):
            for name in ("attn", "attn2"):
                processor = getattr(getattr(block, name, None), "processor", None)
                if type(processor).__name__ == "SD3IPAdapterJointAttnProcessor2_0":
                    raise TypeError(
                        f"transformer_blocks[{index}].{name} has SD3's IP-Adapter, a second attention of the image over itself "
                        "and the adapter's image, for which there is no window yet. Load the pipeline without it, then "
                        "transform"
                    )
        yield from super().layers(model)

    def processor(
        self, layer: Layer, original: Any, slot: int, down_factor: int | None, formula: Formula | None
    ) -> WindowProcessor:
        plain = super().processor(layer, original, slot, down_factor, formula)
        fused = type(original).__name__ == "FusedJointAttnProcessor2_0"
        return window_processor(original, slot, FusedJointAttnProcessor) if fused else plain

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
        # Tokens are permuted before the first block. If that block is skipped, they stay in raster order.
        order = "raster" if 0 in (kwargs.get("skip_layers") or ()) else None
        return Call(latents, (grid,), {JOINT: text.shape[1], IMAGE: 0}, order=order)

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, switches: Switches
    ) -> tuple[dict[str, Any], CallPlan]:
        if switches.ntk_factor != 1:
            raise ValueError(f"ntk_factor={switches.ntk_factor}: {type(model).__name__} has no rotary positions")
        residuals = kwargs.get("block_controlnet_hidden_states")
        if residuals is not None:
            ordered = [plan.to_image_order(residual) for residual in residuals]
            kwargs = {**kwargs, "block_controlnet_hidden_states": ordered}
        return kwargs, plan

    def inner_hooks(self, model: nn.Module) -> InnerHooks:
        blocks: Any = model.transformer_blocks
        return [(blocks[0], OrderHook())]

    def why_not_parallel_call(self, model: nn.Module, kwargs: dict[str, Any]) -> str | None:
        if 0 in (kwargs.get("skip_layers") or ()):
            return "it skips the first block (skip_layers), where tokens are shared out"
        return None

    def parallel_hooks(self, model: nn.Module, current: Any) -> InnerHooks:
        out: Any = model.proj_out
        return [(out, GatherHook(current))]

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
            f"({most * token} x {most * token} px; pos_embed_max_size={most}). Choose a smaller image; a window does not "
            "extend positions"
        )
    return height, width


def _to_raster(image: Tensor, patch: int, plan: CallPlan) -> Tensor:
    """An image ``[B, C, H, W]`` whose patches lie in the plan's order, with each patch back in its place."""
    if plan.base.inverse is None:
        return image
    channels, rows, columns = (image.shape[1], image.shape[2] // patch, image.shape[3] // patch)
    patches = image.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # [B, C, h, p, w, p]
    tokens = plan.to_raster(patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2))  # [B, h w, C, p, p]
    patches = tokens.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(image), channels, rows * patch, columns * patch)


SD3 = SD3Family(
    model_class="SD3Transformer2DModel",
    processors=("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"),
    stacks={"transformer_blocks": ("attn", "attn2")},
    carrier_argument="joint_attention_kwargs",
    text_first=False,
    scopes={"attn2": IMAGE},
    rope=False,
    pipelines=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
    ),
    notes=(
        "SD3 and SD3.5, with SD3.5 medium's image-only attention and skip_guidance_layers; sizes up to the model's position "
        "embedding; no IP-Adapter"
    ),
)
