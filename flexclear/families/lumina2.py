"""Lumina 2: each sample's image directly follows its own caption; a refiner of the image alone runs before."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexclear.families.latents import LatentsFamily
from flexclear.families.zimage import kept
from flexclear.masks.defaults import independent
from flexclear.runtime.checks import required_tensor
from flexclear.runtime.facts import JOINT, Call
from flexclear.runtime.grid import GridReader

IMAGE = "image"
"""Scope of the noise refiner."""


@dataclass(frozen=True)
class Lumina2Family(LatentsFamily):
    """``Lumina2Transformer2DModel``. Its caption refiner has no image tokens, and is unchanged."""

    def read(self, model: Any, kwargs: dict[str, Any], grids: GridReader) -> Call:
        call = super().read(model, kwargs, grids)
        mask, text = required_tensor(kwargs, "encoder_attention_mask", model), kwargs[self.text]
        if mask.shape != text.shape[:2]:
            raise ValueError(
                f"encoder_attention_mask must be of shape {tuple(text.shape[:2])} (batch, text tokens), got {tuple(mask.shape)}"
            )
        # The model reads the lengths from the device, too.
        lengths = grids.once(mask, _lengths)
        longest, (height, width) = max(lengths), call.grids[0]
        first, rows, columns = model.rope_embedder.axes_lens
        if longest >= first or height > rows or width > columns:
            raise ValueError(
                f"an image of {height} x {width} tokens behind a caption of {longest} is too large for the positions of this "
                f"{type(model).__name__}: they end at {rows} x {columns} tokens and a caption of {first - 1} (axes_lens="
                f"{list(model.rope_embedder.axes_lens)}). Choose a smaller one; a window does not extend positions"
            )
        keep = {JOINT: kept(longest, lengths, mask.device)} if min(lengths) < longest else {}
        return Call(call.tokens, call.grids, {JOINT: longest, IMAGE: 0}, keep, text_adjoins=True)

    def stretched(self, model: Any, factor: float) -> Any:
        own = model.rope_embedder
        kind: Any = type(own)
        return _embedder(kind, own.theta * factor, tuple(own.axes_dim), tuple(own.axes_lens), own.patch_size)


def _lengths(mask: Tensor) -> tuple[int, ...]:
    """Length of each caption.

    Raises:
        ValueError: a mask is not ones followed by zeros: the model reads only its sum.
    """
    lengths = mask.bool().sum(1)
    if not torch.equal(mask.bool(), torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        raise ValueError(
            "encoder_attention_mask has padding before text or within it, and the model takes the first tokens for the "
            "caption, as many as the mask keeps. Pad captions at their end (tokenizer.padding_side='right')"
        )
    return tuple(lengths.tolist())


@functools.lru_cache(maxsize=8)
@independent
def _embedder(kind: type, theta: float, dims: tuple[int, ...], lens: tuple[int, ...], patch: int) -> Any:
    """Rotary embedding with another base: tables, cached for later calls."""
    return kind(theta, list(dims), list(lens), patch)


LUMINA2 = Lumina2Family(
    model_class="Lumina2Transformer2DModel",
    processors=("Lumina2AttnProcessor2_0",),
    stacks={"noise_refiner": "attn", "layers": "attn"},
    carriers=("rope_embedder",),
    scopes={"noise_refiner": IMAGE},
    given={"attention_mask": None},
    pipelines=("Lumina2Pipeline",),
    notes="captions of different lengths in a batch, noise refiner included; sizes and captions up to the model's positions",
)
