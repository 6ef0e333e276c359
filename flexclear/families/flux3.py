"""FLUX.3: blocks over the image alone, over reference images alone, and over text, image and references together."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from flexclear.families.latents import StretchHook
from flexclear.families.tokens import TokensFamily, check_tokens
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.checks import required_tensor
from flexclear.runtime.facts import REFERENCES, Call
from flexclear.runtime.family import InnerHooks
from flexclear.runtime.grid import Axes, GridReader, Grids, exact_ids
from flexclear.runtime.switches import Switches

IMAGE = "image"
"""Scope of the blocks that attend over the image alone."""

TOKENS, IDS = "image_cond_hidden_states", "image_cond_ids"
"""Arguments with the reference images."""


@dataclass(frozen=True)
class Flux3Family(TokensFamily):
    """``Flux3Transformer2DModel``.

    Tokens stay in raster order except in attention: an image's order depends on where it begins in the sequence, and that
    differs between the kinds of blocks. Blocks over text alone are unchanged.
    """

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        call = super().read(model, kwargs, grids)
        if len(call.grids) != 1:
            raise ValueError(
                f"{self.ids} describe {len(call.grids)} images, and a {type(model).__name__} takes reference images in "
                f"{TOKENS}, with their ids in {IDS}"
            )
        references: Grids = ()
        if kwargs.get(TOKENS) is not None or kwargs.get(IDS) is not None:
            required_tensor(kwargs, TOKENS, model)
            references = grids(required_tensor(kwargs, IDS, model), replace(self.axes, image=None))
            check_tokens(model, kwargs, references, f"{IDS} describe", TOKENS)
        return replace(
            call,
            grids=(*call.grids, *references),
            text_lens={**call.text_lens, IMAGE: 0, REFERENCES: 0},
            own_grids={IMAGE: call.grids, REFERENCES: references or call.grids},
        )

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact: bool, switches: Switches
    ) -> tuple[dict[str, Any], CallPlan]:
        changed = dict(kwargs)
        if exact:
            start = 0
            for name in (self.ids, IDS):
                ids = kwargs.get(name)
                if ids is not None and ids.ndim == 2:
                    places = (plan.base.to_raster(axis, 0) for axis in (plan.base.rows, plan.base.columns))
                    rows, columns = (axis[start : start + len(ids)] for axis in places)
                    changed[name] = exact_ids(ids, rows, columns, self.axes)
                    start += len(ids)
        if switches.ntk_factor == 1:
            return changed, plan
        embedder: Any = copy.copy(model.get_submodule(self.embed))
        embedder.theta *= switches.ntk_factor
        return changed, replace(plan, embedder=embedder)

    def hooks(self, model: nn.Module, names: Iterable[str]) -> InnerHooks:
        return [(model.get_submodule(self.embed), StretchHook()), *super().hooks(model, names)]

    def why_not_parallel(self, model: nn.Module) -> str | None:
        return "its blocks attend over the image alone, references alone and all together, each in an order of its own"


FLUX3 = Flux3Family(
    model_class="Flux3Transformer2DModel",
    processors=("Flux3AttnProcessor",),
    stacks={"mode_blocks.image": "attn", "mode_blocks.image_cond": "attn", "single_transformer_blocks": "attn"},
    # The model concatenates rotary embeddings before they reach the blocks; these modulations reach them unchanged.
    carriers=("single_stream_modulations.txt", "early_stream_modulations.image", "early_stream_modulations.image_cond"),
    block_argument="image_rotary_emb",
    scopes={"mode_blocks.image": IMAGE, "mode_blocks.image_cond": REFERENCES},
    raster=True,
    axes=Axes(picture=3, step=0.5),
    attention_kwargs="attention_kwargs",
    pipelines=("Flux3ModularPipeline", "Flux3DistilledModularPipeline"),
    notes=(
        "base and distilled; reference images are further grids, also in the blocks that attend over them alone; text padding is "
        "attended to, as in diffusers"
    ),
)
