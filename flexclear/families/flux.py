"""FLUX.1: 19 double-stream and 38 single-stream blocks, text first, RoPE over (index, y, x)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.attention import windowed_attention
from flexclear.families.base import Call
from flexclear.grid import grid_ids
from flexclear.plan import Plan

PLAN = "flexclear_plan"
"""Key under which the plan travels in ``joint_attention_kwargs``, whose entries reach every processor."""


class FluxWindowProcessor:
    """Attention of a FLUX block under the plan's window; projections, norms and RoPE as in diffusers' own processor."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        flexclear_plan: Plan | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Shapes: image ``[B, N, C]``, text ``[B, T, C]`` in double-stream blocks; both in ``hidden_states`` in single ones.

        Raises:
            ValueError: no plan: the block was called without the model's entry, where windows are made.
        """
        from diffusers.models.embeddings import apply_rotary_emb
        from diffusers.models.transformers.transformer_flux import _get_qkv_projections

        if flexclear_plan is None:
            raise ValueError(
                "a transformed FLUX block was called without its window. Call the transformer or the pipeline, whose "
                "entry makes it; flexclear.restore(model) gives the plain block back"
            )
        query, key, value, *text = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (t.unflatten(-1, (-1, attn.head_dim)) for t in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if attn.added_kv_proj_dim is not None:
            text_query, text_key, text_value = (t.unflatten(-1, (-1, attn.head_dim)) for t in text)
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        out = windowed_attention(query, key, value, flexclear_plan.mask)
        out = out.transpose(1, 2).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text_len = encoder_hidden_states.shape[1]
        image_out = attn.to_out[1](attn.to_out[0](out[:, text_len:].contiguous()))
        return image_out, attn.to_add_out(out[:, :text_len].contiguous())

    # diffusers assigns these two on every processor (set_attention_backend, enable_parallelism). Taking the value and
    # ignoring it would break silently.
    @property
    def _attention_backend(self) -> None:
        return None

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        if backend is not None:
            raise ValueError(
                f"attention backend {backend!r} cannot be set on a transformed model: its attention is windowed. Choose "
                "backend='auto', 'flex' or 'sdpa' in flexclear.transform, or flexclear.restore(model) first"
            )

    @property
    def _parallel_config(self) -> None:
        return None

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if config is not None:
            raise ValueError(
                "context parallelism cannot be enabled on a transformed model: its windows are made for whole pictures. "
                "flexclear.restore(model) first"
            )


def _tensor(kwargs: dict[str, Any], name: str) -> Tensor:
    value = kwargs.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"a transformed FLUX model needs {name} as a tensor, got {value!r}")
    return value


class FluxFamily:
    """``FluxTransformer2DModel``."""

    model_class = "FluxTransformer2DModel"
    text_first = True

    def matches(self, model: nn.Module) -> bool:
        from diffusers import FluxTransformer2DModel

        return isinstance(model, FluxTransformer2DModel)

    def attention_modules(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

        found = 0
        for stack in ("transformer_blocks", "single_transformer_blocks"):
            for index, block in enumerate(getattr(model, stack, ())):
                attn = getattr(block, "attn", None)
                if not isinstance(attn, FluxAttention):
                    raise ValueError(
                        f"{stack}[{index}] of this {type(model).__name__} has no FluxAttention named attn "
                        f"(found {type(attn).__name__}): not the blocks that FLUX.1 has in diffusers"
                    )
                if type(attn.processor) not in (FluxAttnProcessor, FluxWindowProcessor):
                    raise TypeError(
                        f"{stack}[{index}].attn has a {type(attn.processor).__name__}; flexclear replaces "
                        "FluxAttnProcessor only. Unload the plugin that installed it, transform, and load it again"
                    )
                found += 1
                yield f"{stack}.{index}.attn", attn
        if not found:
            raise ValueError(
                f"this {type(model).__name__} has no blocks in transformer_blocks or single_transformer_blocks: nothing "
                "to transform"
            )

    def processor(self) -> FluxWindowProcessor:
        return FluxWindowProcessor()

    def read(self, kwargs: dict[str, Any], grid: Callable[[Tensor], tuple[int, int]]) -> Call:
        tokens, text, ids = (_tensor(kwargs, n) for n in ("hidden_states", "encoder_hidden_states", "img_ids"))
        attention_kwargs = kwargs.get("joint_attention_kwargs") or {}
        if attention_kwargs.get("attention_mask") is not None:
            given = attention_kwargs["attention_mask"]
            raise ValueError(
                f"joint_attention_kwargs holds an attention_mask ({type(given).__name__} of shape "
                f"{tuple(getattr(given, 'shape', ()))}), but flexclear makes the mask of a transformed model. Leave it "
                "out, or flexclear.restore(model) first"
            )
        height, width = grid(ids)
        if tokens.ndim != 3 or tokens.shape[1] != height * width:
            raise ValueError(
                f"hidden_states of shape {tuple(tokens.shape)} do not hold the {height} x {width} = {height * width} "
                "image tokens that img_ids describes; [batch, tokens, channels] is expected"
            )
        return Call(height, width, text.shape[1], tokens)

    def enter(self, kwargs: dict[str, Any], plan: Plan, exact_ids: bool) -> dict[str, Any]:
        changed = dict(kwargs)
        changed["hidden_states"] = plan.to_image_order(kwargs["hidden_states"])
        ids = kwargs["img_ids"]
        changed["img_ids"] = (
            grid_ids(plan.rows, plan.columns)
            if exact_ids
            else plan.to_image_order(ids[0] if ids.ndim == 3 else ids, dim=0)
        )
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if kwargs.get(name) is not None:
                changed[name] = [plan.to_image_order(residual) for residual in kwargs[name]]
        changed["joint_attention_kwargs"] = {**(kwargs.get("joint_attention_kwargs") or {}), PLAN: plan}
        return changed

    def plan_of(self, kwargs: dict[str, Any]) -> Plan:
        return kwargs["joint_attention_kwargs"][PLAN]

    def leave(self, output: Any, plan: Plan) -> Any:
        if isinstance(output, tuple):
            return (plan.to_raster(output[0]), *output[1:])
        output.sample = plan.to_raster(output.sample)
        return output
