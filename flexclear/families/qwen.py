"""Qwen-Image, Edit and Layered: double-stream blocks, text first and padded, RoPE made inside from ``img_shapes``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.checks import attention_of, refuse_mask, required_tensor
from flexclear.families.flux import check_residuals, check_tokens
from flexclear.masks.defaults import independent
from flexclear.masks.lengths import mark_symbolic
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.family import Family
from flexclear.runtime.grid import GridReader, Grids
from flexclear.runtime.processors import PLAN, cos_and_sin

Tables = tuple[Tensor, Tensor]

SHAPES_EXPECTED = (
    "a list with one entry per sample, each a list of (frames, height, width) in tokens: the image's first, then those "
    "of its reference pictures"
)


class QwenFamily(Family):
    """``QwenImageTransformer2DModel``."""

    model_class = "QwenImageTransformer2DModel"
    text_first = True
    idles = False  # its rotary embedding cannot be applied to no tokens
    pipelines = (
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
    )
    notes = (
        "padded text is masked; reference images (Edit, Edit Plus) and layers (Layered) are further grids, met by row "
        "and column from the top left. Several frames and batches of different sizes raise"
    )

    def layers(self, model: nn.Module) -> Iterator[Layer]:
        from diffusers.models.attention_processor import Attention
        from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

        blocks = getattr(model, "transformer_blocks", ())
        for index, block in enumerate(blocks):
            where = f"transformer_blocks[{index}]"
            attn = attention_of(model, block, where, "attn", Attention, (QwenDoubleStreamAttnProcessor2_0,))
            yield Layer(f"transformer_blocks.{index}.attn", attn)
        if not len(blocks):
            raise ValueError(f"this {type(model).__name__} has no blocks in transformer_blocks: nothing to transform")

    def processor(self, layer: Layer, original: Any, slot: int, down_factor: int | None) -> Any:
        from flexclear.families.qwen_attention import QwenWindowProcessor

        return QwenWindowProcessor(slot)

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        tokens, text = (required_tensor(kwargs, name, model) for name in ("hidden_states", "encoder_hidden_states"))
        refuse_mask(kwargs.get("attention_kwargs") or {}, "attention_kwargs")
        found = grids_of(kwargs.get("img_shapes"))
        check_tokens(model, kwargs, found, "img_shapes describes")
        check_residuals(kwargs)
        return Call(tokens, found, {JOINT: text.shape[1]}, _kept_text(kwargs, text, grids))

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, ntk_factor: float
    ) -> dict[str, Any]:
        tokens, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        embed: Any = model.pos_embed
        if ntk_factor != 1:
            kind: Any = type(embed)
            embed = _rope(kind, embed.theta * ntk_factor, tuple(embed.axes_dim), embed.scale_rope)
        image, words = _tables(embed, kwargs["img_shapes"], text.shape[1], tokens.device)
        if text.shape[1] > 1:
            for table in words:
                mark_symbolic(table, [0])
        plan = replace(plan, rotary=(tuple(plan.to_image_order(table, dim=0) for table in image), words))
        changed = {**kwargs, "hidden_states": plan.to_image_order(tokens)}
        if kwargs.get("controlnet_block_samples") is not None:
            changed["controlnet_block_samples"] = [
                plan.to_image_order(residual) for residual in kwargs["controlnet_block_samples"]
            ]
        changed["attention_kwargs"] = {**(kwargs.get("attention_kwargs") or {}), PLAN: plan}
        return changed

    def why_not_parallel(self, model: nn.Module) -> str | None:
        if getattr(model, "zero_cond_t", False):
            return "it modulates image and reference pictures by different timesteps (zero_cond_t), token by token"
        return None

    def plan_of(self, kwargs: dict[str, Any]) -> CallPlan:
        return kwargs["attention_kwargs"][PLAN]


def grids_of(img_shapes: Any) -> Grids:
    """Grids of ``img_shapes`` in the two forms that diffusers' pipelines hand over: ``[[(1, h, w), ...], ...]`` and, for
    one grid per sample, ``[(1, h, w), ...]``.

    Raises:
        ValueError: another form, pictures of several frames, or samples of different sizes.
    """
    samples = [sample if isinstance(sample, list) else [sample] for sample in _listed(img_shapes)]
    first = samples[0] if samples else []
    if not first or any(
        not isinstance(shape, tuple | list) or len(shape) != 3 or not all(isinstance(n, int) for n in shape)
        for shape in first
    ):
        raise ValueError(f"img_shapes must be {SHAPES_EXPECTED}; got {img_shapes!r}")
    if any(sample != first for sample in samples):
        raise ValueError(
            f"img_shapes has samples of different sizes, {img_shapes!r}: a batch shares one window and one set of "
            "positions. Call the model once for each size"
        )
    if any(frames != 1 for frames, _, _ in first):
        raise ValueError(
            f"img_shapes {img_shapes!r} has several frames; windows are defined on single pictures, frames = 1"
        )
    return tuple((height, width) for _, height, width in first)


def _listed(img_shapes: Any) -> list[Any]:
    return img_shapes if isinstance(img_shapes, list) else [img_shapes]


def _kept_text(kwargs: dict[str, Any], text: Tensor, reader: GridReader) -> dict[str, Tensor]:
    """``Call.keep`` of a call.

    Raises:
        ValueError: the mask is none, or of another shape than the text.
    """
    mask = kwargs.get("encoder_hidden_states_mask")
    if mask is None:
        return {}
    if not isinstance(mask, Tensor) or mask.shape != text.shape[:2]:
        given = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(
            f"encoder_hidden_states_mask must be a tensor of shape {tuple(text.shape[:2])} (batch, text tokens), got {given}"
        )
    return {} if reader.all_true(mask) else {JOINT: mask.to(torch.bool)}


@functools.lru_cache(maxsize=8)
@independent
def _rope(kind: type, theta: float, axes: tuple[int, ...], scale_rope: bool) -> Any:
    """A rotary embedding of another base: tables of 8192 positions, kept for the calls to come."""
    return kind(theta, list(axes), scale_rope)


@independent
def _tables(embed: Any, img_shapes: Any, text_len: int, device: torch.device) -> tuple[Tables, Tables]:
    """Rotary tables of the image in raster order and of the text, cosines and sines ``[tokens, head_dim]``."""
    image, words = embed(img_shapes, max_txt_seq_len=text_len, device=device)
    return cos_and_sin(image), cos_and_sin(words)
