"""Qwen-Image, Edit and Layered: double-stream blocks, padded text first, RoPE made inside the model from ``img_shapes``."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.tokens import check_residuals, check_tokens
from flexclear.masks.defaults import independent
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.checks import refuse_mask, required_tensor
from flexclear.runtime.facts import JOINT, Call
from flexclear.runtime.family import Family
from flexclear.runtime.grid import GridReader, Grids
from flexclear.runtime.rotary import cos_and_sin
from flexclear.runtime.switches import Switches

Tables = tuple[Tensor, Tensor]
RESIDUALS = ("controlnet_block_samples",)

SHAPES_EXPECTED = (
    "a list with one entry per sample, each a list of (frames, height, width) in tokens: the image's first, then those "
    "of its reference images"
)


@dataclass(frozen=True)
class QwenFamily(Family):
    """``QwenImageTransformer2DModel``."""

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        tokens, text = (required_tensor(kwargs, name, model) for name in ("hidden_states", "encoder_hidden_states"))
        refuse_mask(kwargs.get("attention_kwargs") or {}, "attention_kwargs")
        found = grids_of(kwargs.get("img_shapes"))
        check_tokens(model, kwargs, found, "img_shapes describes")
        check_residuals(kwargs, RESIDUALS)
        return Call(tokens, found, {JOINT: text.shape[1]}, _kept_text(kwargs, text, grids))

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, switches: Switches
    ) -> tuple[dict[str, Any], CallPlan]:
        tokens, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        embed: Any = model.pos_embed
        if switches.ntk_factor != 1:
            kind: Any = type(embed)
            embed = _rope(kind, embed.theta * switches.ntk_factor, tuple(embed.axes_dim), embed.scale_rope)
        # Real numbers in the plan's order; the model's own tables are complex and in raster order.
        image, words = _tables(embed, kwargs["img_shapes"], text.shape[1], tokens.device)
        tables = (torch.cat([own, plan.to_image_order(table, dim=0)]) for own, table in zip(words, image, strict=True))
        cos, sin = (table[None, :, None] for table in tables)
        changed = {**kwargs, "hidden_states": plan.to_image_order(tokens)}
        for name in RESIDUALS:
            if kwargs.get(name) is not None:
                changed[name] = [plan.to_image_order(residual) for residual in kwargs[name]]
        return changed, replace(plan, rotary=(cos, sin))

    def why_not_parallel(self, model: nn.Module) -> str | None:
        if getattr(model, "zero_cond_t", False):
            return "it modulates image and reference images by different timesteps (zero_cond_t), token by token"
        return None


def grids_of(img_shapes: Any) -> Grids:
    """Grids of ``img_shapes`` in the two forms that diffusers' pipelines pass: ``[[(1, h, w), ...], ...]`` and, with one
    grid per sample, ``[(1, h, w), ...]``.

    Raises:
        ValueError: another form, images of several frames, or samples of different sizes.
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
            f"img_shapes {img_shapes!r} has several frames; windows are defined on single images, frames = 1"
        )
    return tuple((height, width) for _, height, width in first)


def _listed(img_shapes: Any) -> list[Any]:
    return img_shapes if isinstance(img_shapes, list) else [img_shapes]


def _kept_text(kwargs: dict[str, Any], text: Tensor, reader: GridReader) -> dict[str, Tensor]:
    """``Call.keep`` of a call.

    Raises:
        ValueError: it is not a mask, or its shape does not match the text.
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
    """A rotary embedding with another base: tables of 8192 positions, cached for later calls."""
    return kind(theta, list(axes), scale_rope)


@independent
def _tables(embed: Any, img_shapes: Any, text_len: int, device: torch.device) -> tuple[Tables, Tables]:
    """Rotary tables of the image in raster order and of the text, cosines and sines ``[tokens, head_dim]``."""
    image, words = embed(img_shapes, max_txt_seq_len=text_len, device=device)
    return cos_and_sin(image), cos_and_sin(words)


QWEN = QwenFamily(
    model_class="QwenImageTransformer2DModel",
    processors=("QwenDoubleStreamAttnProcessor2_0",),
    stacks={"transformer_blocks": "attn"},
    carrier_argument="attention_kwargs",
    given={"encoder_hidden_states_mask": None},
    idles=False,  # its rotary embedding cannot be applied to no tokens
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
    ),
    notes=(
        "padded text is masked; reference images (Edit, Edit Plus) and layers (Layered) are further grids, aligned by row and "
        "column from the top left. Several frames and batches of different sizes raise"
    ),
)
