"""Mochi: diffusers runs attention for each sample separately, over video and unpadded text; here one masked call serves all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexclear.families.latents import LatentsFamily
from flexclear.families.zimage import kept
from flexclear.runtime.checks import required_mask
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.grid import GridReader
from flexclear.runtime.mechanism import Formula
from flexclear.runtime.processors import WindowProcessor, window_processor

MASK = "encoder_attention_mask"


class MochiJointAttnProcessor:
    """diffusers' ``MochiAttnProcessor2_0`` for all samples of a batch at once. The original extracts each sample's unpadded
    text tokens, for which it needs their number on the host; here padding stays, and the plan masks it.

    What padding itself attends to does not matter, since nothing sees it.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        def heads(tokens: Tensor, query: Any, key: Any, value: Any, of_query: Any, of_key: Any) -> list[Tensor]:
            parts = [projection(tokens).unflatten(2, (attn.heads, -1)) for projection in (query, key, value)]
            norms = of_query, of_key, None
            return [part if norm is None else norm(part) for norm, part in zip(norms, parts, strict=True)]

        video = heads(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        text = heads(encoder_hidden_states, *added, attn.norm_added_q, attn.norm_added_k)
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb
            video[:2] = [_turned(part, cos, sin) for part in video[:2]]
        query, key, value = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(video, text, strict=True))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask).transpose(1, 2).flatten(2)
        of_video, of_text = out.split((hidden_states.shape[1], encoder_hidden_states.shape[1]), dim=1)
        of_video = attn.to_out[1](attn.to_out[0](of_video))
        return of_video, attn.to_add_out(of_text) if hasattr(attn, "to_add_out") else of_text


def _turned(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys ``[B, N, heads, head_dim]`` with neighbouring channels rotated, by ``[N, heads, head_dim / 2]``."""
    first, second = tokens.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.to(tokens.dtype).flatten(-2)


@dataclass(frozen=True)
class MochiFamily(LatentsFamily):
    """``MochiTransformer3DModel``. The pooling of its text is unchanged."""

    def processor(
        self, layer: Layer, original: Any, slot: int, down_factor: int | None, formula: Formula | None
    ) -> WindowProcessor:
        super().processor(layer, original, slot, down_factor, formula)  # raises for unsupported settings
        return window_processor(original, slot, MochiJointAttnProcessor, given=self.given)

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        call = super().read(model, kwargs, grids)
        mask = required_mask(kwargs, MASK, self.text, model)
        lengths = grids.once(mask, _lengths)
        if min(lengths) == mask.shape[1]:
            return call
        return replace(call, keep={JOINT: kept(mask.shape[1], lengths, mask.device)})


def _lengths(mask: Tensor) -> tuple[int, ...]:
    """Length of each text.

    Raises:
        ValueError: a mask is not ones followed by zeros: diffusers would mix up the text tokens.
    """
    lengths = mask.bool().sum(1)
    if not torch.equal(mask.bool(), torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        raise ValueError(
            f"{MASK} has padding before text or within it, for which diffusers' attention gives a token another one's output. "
            "Pad texts at their end (tokenizer.padding_side='right')"
        )
    return tuple(lengths.tolist())


MOCHI = MochiFamily(
    model_class="MochiTransformer3DModel",
    processors=("MochiAttnProcessor2_0",),
    stacks={"transformer_blocks": "attn1"},
    carriers=("rope",),
    text_first=False,
    given={"attention_mask": None},
    rope=False,
    no_ntk="learns its rotary frequencies, which have no base",
    video=True,
    rows=0,
    frames_per_latent=6,
    pipelines=("MochiPipeline",),
    notes="padded text is masked, for all samples of a batch at once and without a synchronization to count it",
)
