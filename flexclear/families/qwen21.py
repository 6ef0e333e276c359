"""Qwen-Image 2.1: text and condition images attend causally and do not see the image; the image's rows come last and see all."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.latents import LatentsFamily
from flexclear.families.qwen import grids_of
from flexclear.masks.defaults import independent
from flexclear.runtime.checks import refuse_mask, required_tensor
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.grid import GridReader
from flexclear.runtime.mechanism import Formula
from flexclear.runtime.processors import WindowProcessor

SLOT = 4
"""Number of image tokens that one place among the text's features stands for."""


@dataclass(frozen=True)
class QwenImage21Family(LatentsFamily):
    """``QwenImage21Transformer2DModel``.

    Its stock processor attends in parts: each stretch of text and each condition image over everything up to it, and finally
    the image's rows over all. The window applies to the last part. Everything before the image counts as text and keeps its
    own attention, so a cache of its keys and values holds the same as the dense model's.
    """

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        tokens, text, places = (
            required_tensor(kwargs, name, model) for name in ("hidden_states", "encoder_hidden_states", "img_mask")
        )
        refuse_mask(kwargs.get("attention_kwargs") or {}, "attention_kwargs")
        *conditions, grid = grids_of(kwargs.get("img_shapes"))
        given, own = sum(height * width for height, width in conditions), grid[0] * grid[1]
        if tokens.ndim != 3 or tokens.shape[1] != given + own:
            raise ValueError(
                f"hidden_states of shape {tuple(tokens.shape)} do not hold the {given} + {own} tokens of condition images and "
                "image that img_shapes describes; [batch, tokens, channels] is expected"
            )
        if given % SLOT or own % SLOT or places.shape[1] != text.shape[1] + own // SLOT:
            raise ValueError(
                f"img_mask of shape {tuple(places.shape)} does not hold the {text.shape[1]} places of encoder_hidden_states "
                f"and one for every {SLOT} of the image's {own} tokens"
            )
        alike, trailing = grids.once(places, _alike_and_trailing)
        if not alike or trailing < own // SLOT:
            raise ValueError(
                "img_mask must be the same for the whole batch, and end with the places of the image: the model reads the first "
                "sample's alone"
            )
        prefix = text.shape[1] + given - given // SLOT
        call = Call(tokens, (grid,), {JOINT: prefix})
        mask = kwargs.get("encoder_hidden_states_mask")
        if mask is None:
            return call
        if not isinstance(mask, Tensor) or mask.shape != text.shape[:2]:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(
                f"encoder_hidden_states_mask must be a tensor of shape {tuple(text.shape[:2])} (batch, text tokens), got {shape}"
            )
        if grids.all_true(mask):
            return call
        images = places[:1, : text.shape[1]].bool()
        repeats = torch.where(images[0], SLOT, 1)
        keep = torch.repeat_interleave(mask.bool() | images, repeats, dim=1, output_size=prefix)
        return replace(call, keep={JOINT: keep})

    def processor(
        self, layer: Layer, original: Any, slot: int, down_factor: int | None, formula: Formula | None
    ) -> WindowProcessor:
        processor = super().processor(layer, original, slot, down_factor, formula)
        processor.in_parts = True
        return processor

    def stretched(self, model: Any, factor: float) -> Any:
        own: Any = model.pos_embed
        kind: Any = type(own)
        return _embedder(kind, own.theta * factor, tuple(own.axes_dim))


def _alike_and_trailing(places: Tensor) -> tuple[bool, int]:
    """Whether all samples have images at the same places, and how many such places are at the end."""
    others = torch.nonzero(~places[0].bool())[:, 0]
    return bool((places == places[:1]).all()), places.shape[1] - (int(others[-1]) + 1 if len(others) else 0)


@functools.lru_cache(maxsize=8)
@independent
def _embedder(kind: type, theta: float, dims: tuple[int, ...]) -> Any:
    """Rotary embedding with another base: tables of 8192 positions, cached for later calls."""
    return kind(theta, list(dims))


QWEN_IMAGE21 = QwenImage21Family(
    model_class="QwenImage21Transformer2DModel",
    processors=("QwenImage21AttnProcessor",),
    stacks={"transformer_blocks": "attn"},
    carriers=("modulation",),
    embedder="pos_embed",
    latents_per_token=1,
    pipelines=("QwenImage21Pipeline",),
    notes=(
        "the image's own tokens have the window; causal text and condition images before it are seen by all of them, cached or "
        "not. QwenImage21FlexAttnProcessor raises"
    ),
)
