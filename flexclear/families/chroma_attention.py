"""Windowed attention processors for Chroma's attention modules, which are FLUX's, under gradient checkpointing too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexclear.call_plan import CallPlan
from flexclear.families.flux_attention import FluxIPWindowProcessor, FluxWindowProcessor


class Carrier(Tensor):
    """A tensor that hands a plan on to everything that is computed from it.

    Under gradient checkpointing diffusers' Chroma keeps ``joint_attention_kwargs``, in which plans travel, from its blocks.
    The rotary embedding still reaches them, and it is computed from the position ids: so those carry the plan.
    """

    plan: CallPlan

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_function__(func, types, args, kwargs)
        plan = _plan_in([*args, *kwargs.values()])
        if isinstance(out, Carrier) and plan is not None:
            out.plan = plan
        return out


def carrying(plan: CallPlan, ids: Tensor) -> Tensor:
    """Position ids ``[N, axes]`` that carry a plan."""
    carrier = ids.as_subclass(Carrier)
    carrier.plan = plan
    return carrier


def _plan_in(argument: Any) -> CallPlan | None:
    if isinstance(argument, list | tuple):
        return next((found for found in map(_plan_in, argument) if found is not None), None)
    return getattr(argument, "plan", None) if isinstance(argument, Carrier) else None


class ChromaWindowProcessor(FluxWindowProcessor):
    """FLUX's, which takes the plan from the rotary embedding where there is no other."""

    def joint(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        image_rotary_emb: tuple[Tensor, Tensor] | None,
        plan: CallPlan | None,
    ) -> tuple[Tensor, int, Tensor]:
        """See ``FluxWindowProcessor.joint``."""
        if image_rotary_emb is not None and isinstance(image_rotary_emb[0], Carrier):
            plan = image_rotary_emb[0].plan
            cos, sin = (part.as_subclass(torch.Tensor) for part in image_rotary_emb)
            image_rotary_emb = (cos, sin)
        return super().joint(attn, hidden_states, encoder_hidden_states, image_rotary_emb, plan)


class ChromaIPWindowProcessor(ChromaWindowProcessor, FluxIPWindowProcessor):
    """The same beside an IP-Adapter; see ``FluxIPWindowProcessor``."""
