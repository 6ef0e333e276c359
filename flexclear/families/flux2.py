"""FLUX.2 dev and klein: double- and single-stream blocks, text first, RoPE over (picture, y, x, place in the text)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from flexclear.families.checks import attention_of, refuse_mask, required_tensor
from flexclear.families.flux import check_tokens, permuted, with_ntk
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.family import Family
from flexclear.runtime.grid import GridReader
from flexclear.runtime.processors import PLAN

CACHE_ARGUMENTS = ("kv_cache_mode", "kv_cache", "num_ref_tokens")


class Flux2Family(Family):
    """``Flux2Transformer2DModel``."""

    model_class = "Flux2Transformer2DModel"
    text_first = True
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
    notes = (
        "dev and klein; reference images are further grids. Key-value caching of reference images "
        "(Flux2KleinKVPipeline) raises: there they see only themselves, which is no window"
    )

    def layers(self, model: nn.Module) -> Iterator[Layer]:
        from diffusers.models.transformers.transformer_flux2 import (
            Flux2Attention,
            Flux2AttnProcessor,
            Flux2KVAttnProcessor,
            Flux2KVParallelSelfAttnProcessor,
            Flux2ParallelSelfAttention,
            Flux2ParallelSelfAttnProcessor,
        )

        stacks = {
            "transformer_blocks": (Flux2Attention, (Flux2AttnProcessor, Flux2KVAttnProcessor)),
            "single_transformer_blocks": (
                Flux2ParallelSelfAttention,
                (Flux2ParallelSelfAttnProcessor, Flux2KVParallelSelfAttnProcessor),
            ),
        }
        found = 0
        for stack, (kind, processors) in stacks.items():
            for index, block in enumerate(getattr(model, stack, ())):
                attn = attention_of(model, block, f"{stack}[{index}]", "attn", kind, processors)
                found += 1
                yield Layer(f"{stack}.{index}.attn", attn)
        if not found:
            raise ValueError(
                f"this {type(model).__name__} has no blocks in transformer_blocks or single_transformer_blocks: nothing "
                "to transform"
            )

    def processor(self, layer: Layer, original: Any, slot: int, down_factor: int | None) -> Any:
        from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttention

        from flexclear.families import flux2_attention

        if isinstance(layer.module, Flux2ParallelSelfAttention):
            return flux2_attention.Flux2ParallelWindowProcessor(slot)
        return flux2_attention.Flux2WindowProcessor(slot)

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        tokens, text, ids, _ = (
            required_tensor(kwargs, name, model)
            for name in ("hidden_states", "encoder_hidden_states", "img_ids", "txt_ids")
        )
        extra = kwargs.get("joint_attention_kwargs") or {}
        refuse_mask(extra, "joint_attention_kwargs")
        _refuse_cache(extra)
        _refuse_cache(kwargs)
        found = grids(ids)
        check_tokens(model, kwargs, found)
        return Call(tokens, found, {JOINT: text.shape[1]})

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, ntk_factor: float
    ) -> dict[str, Any]:
        return with_ntk(model, permuted(kwargs, plan, exact_ids), ntk_factor)

    def plan_of(self, kwargs: dict[str, Any]) -> CallPlan:
        return kwargs["joint_attention_kwargs"][PLAN]


def _refuse_cache(arguments: dict[str, Any]) -> None:
    """Raise if the call fills or uses a cache of the reference pictures' keys and values.

    Raises:
        ValueError: it does.
    """
    for name in CACHE_ARGUMENTS:
        given = arguments.get(name)
        if given is not None and given != 0:
            shown = repr(given) if isinstance(given, str | int) else f"a {type(given).__name__}"
            raise ValueError(
                f"{name}={shown} asks FLUX.2 to cache its reference pictures' keys and values. They then see only "
                "themselves, and the image sees all of them: no window does that. Call the model without it "
                "(Flux2KleinPipeline in place of Flux2KleinKVPipeline), or flexclear.restore(model) first"
            )
