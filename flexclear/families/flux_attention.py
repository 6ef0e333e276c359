"""Windowed attention processors for FLUX's attention modules; imported when a FLUX model is transformed."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxIPAdapterAttnProcessor,
    _get_qkv_projections,
)
from torch import Tensor, nn

from flexclear.runtime.attention import windowed_attention
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.processors import WindowProcessor


class FluxWindowProcessor(WindowProcessor):
    """Attention of a FLUX block under the plan's window; projections, norms and RoPE as in diffusers' own processor."""

    def __init__(self, slot: int | None = None) -> None:
        self.slot = slot

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        flexclear_plan: CallPlan | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Shapes: image ``[B, N, C]``, text ``[B, T, C]`` in double-stream blocks; both in ``hidden_states`` in single ones.

        Raises:
            ValueError: no plan: the block was called without the model's entry, where windows are made.
        """
        out, text_len, _ = self.joint(attn, hidden_states, encoder_hidden_states, image_rotary_emb, flexclear_plan)
        return out if encoder_hidden_states is None else _project(attn, out, text_len)

    def joint(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        image_rotary_emb: tuple[Tensor, Tensor] | None,
        plan: CallPlan | None,
    ) -> tuple[Tensor, int, Tensor]:
        """Attention over text and image, ``[B, T + N, C]``, the number T of text tokens that precede the image in it,
        and the image's queries before RoPE, ``[B, N, heads, head_dim]``."""
        query, key, value, *text = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (t.unflatten(-1, (-1, attn.head_dim)) for t in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        image_query = query
        if attn.added_kv_proj_dim is not None:
            text_query, text_key, text_value = (t.unflatten(-1, (-1, attn.head_dim)) for t in text)
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        if plan is not None and plan.rotary is not None:
            image_rotary_emb = plan.rotary
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        text_len = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        return self.attend(plan, query, key, value), text_len, image_query


def _project(attn: Any, out: Tensor, text_len: int) -> tuple[Tensor, Tensor]:
    image_out = attn.to_out[1](attn.to_out[0](out[:, text_len:].contiguous()))
    return image_out, attn.to_add_out(out[:, :text_len].contiguous())


class FluxPooledWindowProcessor(FluxWindowProcessor, nn.Module):
    """The same with down-sampled keys (method, section 4).

    Attributes:
        spatial_weight: pooling weights ``[1, 1, 1, d, 1, d, 1]``, initially 1 / d^2, shared by heads and channels.
    """

    def __init__(
        self,
        slot: int | None = None,
        down_factor: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if down_factor is None:
            # What load_ip_adapter does to every processor that it does not know; the trained weights would be lost.
            raise TypeError(
                "this model has down-sampled keys (down_factor), whose trained pooling weights a plugin is about to drop. "
                "flexclear.restore(model) first, or transform without down_factor"
            )
        nn.Module.__init__(self)
        FluxWindowProcessor.__init__(self, slot)
        d = down_factor
        self.spatial_weight = nn.Parameter(torch.full((1, 1, 1, d, 1, d, 1), 1 / d**2, device=device, dtype=dtype))

    def pooling_weight(self, device: torch.device) -> Tensor:
        return _brought(self, "spatial_weight", device)


class FluxCompressedProcessor(FluxWindowProcessor, nn.Module):
    """The same with a formula that compresses keys and values by weights of its own (``flexclear.alternatives``).

    Attributes:
        compression_weight: in the shape that the formula asks for.
    """

    def __init__(
        self,
        slot: int | None = None,
        shape: tuple[int, ...] | None = None,
        filled: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if shape is None:
            # What load_ip_adapter does to every processor that it does not know.
            raise TypeError(
                "this model has trained compression weights (attention='pixart'), which a plugin is about to drop. "
                "flexclear.restore(model) first"
            )
        nn.Module.__init__(self)
        FluxWindowProcessor.__init__(self, slot)
        self.compression_weight = nn.Parameter(torch.full(shape, filled, device=device, dtype=dtype))

    def pooling_weight(self, device: torch.device) -> Tensor:
        return _brought(self, "compression_weight", device)


def _brought(processor: nn.Module, name: str, device: torch.device) -> Tensor:
    """A processor's parameter on ``device``."""
    # accelerate takes the weights of every module away and brings them back for its forward; a processor's never runs.
    hook: Any = getattr(processor, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(processor)
    weight = getattr(processor, name).to(device)
    if hook is not None:
        hook.post_forward(processor, None)
    return weight


class FluxIPWindowProcessor(FluxWindowProcessor, FluxIPAdapterAttnProcessor):
    """The same beside an IP-Adapter, whose layers and scales it shares: the image's queries also attend to the adapter's
    picture tokens, which are not on the grid, densely."""

    def __init__(self, slot: int, adapter: FluxIPAdapterAttnProcessor) -> None:
        nn.Module.__init__(self)
        FluxWindowProcessor.__init__(self, slot)
        self.adapter = [adapter]  # in a list: registered once, under the names that the adapter's weights have
        self.to_k_ip, self.to_v_ip = adapter.to_k_ip, adapter.to_v_ip

    @property
    def scale(self) -> list[float]:
        """Scale of each adapter; set by ``pipe.set_ip_adapter_scale``."""
        return self.adapter[0].scale

    @scale.setter
    def scale(self, scale: list[float]) -> None:
        self.adapter[0].scale = scale

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        flexclear_plan: CallPlan | None = None,
        ip_hidden_states: list[Tensor] | None = None,
        ip_adapter_masks: Tensor | None = None,
    ) -> tuple[Tensor, ...] | Tensor:
        """As in ``FluxWindowProcessor``, and the adapter's share of the image ``[B, N, C]`` as a third output."""
        out, text_len, query = self.joint(attn, hidden_states, encoder_hidden_states, image_rotary_emb, flexclear_plan)
        if encoder_hidden_states is None:
            return out
        image_out, text_out = _project(attn, out, text_len)
        if ip_hidden_states is None:
            return image_out, text_out
        share = torch.zeros_like(image_out)
        adapters = zip(ip_hidden_states, self.scale, self.to_k_ip, self.to_v_ip, strict=False)
        for picture, scale, to_key, to_value in adapters:
            # [B, pictures, tokens, C]: an adapter may be given several pictures.
            key, value = (
                layer(picture).unflatten(-1, (-1, attn.head_dim)).flatten(1, -3).transpose(1, 2)
                for layer in (to_key, to_value)
            )
            seen = windowed_attention(query.transpose(1, 2), key, value, None)
            share = share + scale * seen.transpose(1, 2).flatten(2, 3).to(query.dtype)
        return image_out, text_out, share
