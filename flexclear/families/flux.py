"""FLUX.1: 19 double-stream and 38 single-stream blocks, text first, RoPE over (index, y, x)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.checks import attention_of, refuse_mask, required_tensor
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.family import Family
from flexclear.runtime.grid import GridReader, exact_ids
from flexclear.runtime.mechanism import Formula
from flexclear.runtime.processors import PLAN

RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")
"""Arguments with which FLUX-like models take a ControlNet's residuals, one row per image token."""


def flux_layers(model: nn.Module) -> Iterator[Layer]:
    """The attention layers of a model with FLUX's two stacks of blocks; see ``Family.layers``."""
    from diffusers.models.transformers.transformer_flux import (
        FluxAttention,
        FluxAttnProcessor,
        FluxIPAdapterAttnProcessor,
    )

    found = 0
    replaced = (FluxAttnProcessor, FluxIPAdapterAttnProcessor)
    for stack in ("transformer_blocks", "single_transformer_blocks"):
        for index, block in enumerate(getattr(model, stack, ())):
            attn = attention_of(model, block, f"{stack}[{index}]", "attn", FluxAttention, replaced)
            found += 1
            yield Layer(f"{stack}.{index}.attn", attn)
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no blocks in transformer_blocks or single_transformer_blocks: nothing to "
            "transform"
        )


def check_tokens(
    model: nn.Module,
    kwargs: dict[str, Any],
    grids: tuple[tuple[int, int], ...],
    source: str = "the position ids describe",
) -> None:
    """Raise unless ``hidden_states`` hold as many tokens as the grids have; ``source`` says where those come from.

    Raises:
        ValueError: they do not.
    """
    tokens = kwargs["hidden_states"]
    expected = sum(height * width for height, width in grids)
    if tokens.ndim != 3 or tokens.shape[1] != expected:
        sizes = " + ".join(f"{height} x {width}" for height, width in grids)
        raise ValueError(
            f"hidden_states of shape {tuple(tokens.shape)} do not hold the {sizes} = {expected} image tokens that "
            f"{source}; [batch, tokens, channels] is expected"
        )


def check_residuals(kwargs: dict[str, Any], names: tuple[str, ...] = RESIDUALS) -> None:
    """Raise unless a ControlNet's residuals have a row for each of ``hidden_states``' tokens, which have been checked.

    Without this, putting them into the tokens' order would take the first rows of longer ones.

    Raises:
        ValueError: they have not.
    """
    length = kwargs["hidden_states"].shape[1]
    for name in names:
        residuals = kwargs.get(name)
        for number, residual in enumerate(() if residuals is None else residuals):
            if residual.ndim != 3 or residual.shape[1] != length:
                raise ValueError(
                    f"{name}[{number}] of shape {tuple(residual.shape)} does not hold one residual for each of the {length} "
                    "tokens of hidden_states"
                )


def permuted(kwargs: dict[str, Any], plan: CallPlan, exact: bool) -> dict[str, Any]:
    """FLUX-like arguments in the plan's order: image tokens, their ids, ControlNet residuals; the plan among them."""
    changed = dict(kwargs)
    changed["hidden_states"] = plan.to_image_order(kwargs["hidden_states"])
    ids = plan.to_image_order(kwargs["img_ids"], dim=-2)
    if exact:
        ids = exact_ids(ids[0] if ids.ndim == 3 else ids, plan.base.rows, plan.base.columns)
        # Batched ids are batched for a reason in some families (FLUX.2); the batch shares its grid.
        ids = ids if kwargs["img_ids"].ndim == 2 else ids[None].expand(len(kwargs["img_ids"]), -1, -1)
    changed["img_ids"] = ids
    for name in RESIDUALS:
        if kwargs.get(name) is not None:
            changed[name] = [plan.to_image_order(residual) for residual in kwargs[name]]
    changed["joint_attention_kwargs"] = {**(kwargs.get("joint_attention_kwargs") or {}), PLAN: plan}
    return changed


def with_ntk(model: nn.Module, kwargs: dict[str, Any], ntk_factor: float) -> dict[str, Any]:
    """``kwargs`` as ``permuted`` returned them, with a rotary embedding of a larger base in the plan."""
    if ntk_factor == 1:
        return kwargs
    attention_kwargs = kwargs["joint_attention_kwargs"]
    plan: CallPlan = attention_kwargs[PLAN]
    embed: Any = model.pos_embed
    image, text = (ids[0] if ids.ndim == 3 else ids for ids in (kwargs["img_ids"], kwargs["txt_ids"]))
    ids = torch.cat([text.to(image.dtype), image])
    if plan.ntk_floor:
        rotary = _clipped_rotary(ids, embed.axes_dim, embed.theta, ntk_factor, plan.ntk_floor)
    else:
        rotary = type(embed)(theta=embed.theta * ntk_factor, axes_dim=embed.axes_dim)(ids)
    return {**kwargs, "joint_attention_kwargs": {**attention_kwargs, PLAN: replace(plan, rotary=rotary)}}


def _clipped_rotary(
    ids: Tensor, axes: Sequence[int], theta: float, ntk_factor: float, floor: float
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[N, head_dim]``, float32, in which no frequency is below ``floor`` times that of ``theta``."""
    dtype = torch.float32 if ids.device.type in ("mps", "npu") else torch.float64
    angles = []
    for axis, dim in enumerate(axes):
        exponents = torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim
        frequencies = torch.maximum((theta * ntk_factor) ** -exponents, floor * theta**-exponents)
        angles.append(torch.outer(ids[:, axis].to(dtype), frequencies).repeat_interleave(2, dim=1))
    angle = torch.cat(angles, dim=1)
    return angle.cos().float(), angle.sin().float()


def _place(layer: Layer) -> tuple[torch.device, torch.dtype]:
    """Where a parameter of the layer's processor goes, and its type."""
    weight = next(layer.module.parameters())
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    # Offloaded layers are empty between calls; these few numbers stay and follow the keys.
    return torch.device("cpu") if weight.is_meta else weight.device, dtype


class FluxFamily(Family):
    """``FluxTransformer2DModel``."""

    model_class = "FluxTransformer2DModel"
    text_first = True
    pools = True
    clips_ntk = True
    pipelines = (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "FluxPriorReduxPipeline",
    )
    notes = "dev, schnell, Fill, Control, Kontext (its reference images are further grids), Redux, true CFG"

    def layers(self, model: nn.Module) -> Iterator[Layer]:
        return flux_layers(model)

    def processor(self, layer: Layer, original: Any, slot: int, down_factor: int | None) -> Any:
        from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

        from flexclear.families import flux_attention

        if isinstance(original, FluxIPAdapterAttnProcessor):
            if down_factor is not None:
                raise ValueError(
                    f"{layer.name} has an IP-Adapter, which down-sampled keys (down_factor={down_factor}) do not go "
                    "with yet. pipe.unload_ip_adapter() first, or leave down_factor out"
                )
            return flux_attention.FluxIPWindowProcessor(slot, original)
        if down_factor is None:
            return flux_attention.FluxWindowProcessor(slot)
        return flux_attention.FluxPooledWindowProcessor(slot, down_factor, *_place(layer))

    def formula_processor(self, layer: Layer, original: Any, slot: int, formula: Formula) -> Any:
        from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

        from flexclear.families import flux_attention

        shape = formula.weight_shape(layer.module.inner_dim)
        if shape is None:
            return self.processor(layer, original, slot, None)
        if isinstance(original, FluxIPAdapterAttnProcessor):
            raise ValueError(
                f"{layer.name} has an IP-Adapter, which attention={formula.kind!r} does not go with. "
                "pipe.unload_ip_adapter() first"
            )
        return flux_attention.FluxCompressedProcessor(slot, shape, formula.initial_weight(), *_place(layer))

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        tokens, text, ids = (
            required_tensor(kwargs, name, model) for name in ("hidden_states", "encoder_hidden_states", "img_ids")
        )
        refuse_mask(kwargs.get("joint_attention_kwargs") or {}, "joint_attention_kwargs")
        found = grids(ids)
        check_tokens(model, kwargs, found)
        check_residuals(kwargs)
        return Call(tokens, found, {JOINT: text.shape[1]})

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, ntk_factor: float
    ) -> dict[str, Any]:
        return with_ntk(model, permuted(kwargs, plan, exact_ids), ntk_factor)

    def plan_of(self, kwargs: dict[str, Any]) -> CallPlan:
        return kwargs["joint_attention_kwargs"][PLAN]
