"""Windowed attention processors for Chroma's attention modules, which are FLUX's, under gradient checkpointing too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.flux_attention import FluxIPWindowProcessor, FluxWindowProcessor
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.hooks import Hook


class Carrier(Tensor):
    """A tensor that hands a plan on to everything that is computed from it.

    Under gradient checkpointing diffusers' Chroma keeps ``joint_attention_kwargs``, in which plans travel, from its blocks.
    The rotary embedding still reaches them, and it is computed from the position ids: so those carry the plan there.
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


class RotaryHook(Hook):
    """Forward hook of the module that makes the rotary embedding (cos, sin): a plan that it carries becomes its third part."""

    after = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        plan = _plan_in(output)
        return output if plan is None else (*(part.as_subclass(torch.Tensor) for part in output), plan)


class ChromaWindowProcessor(FluxWindowProcessor):
    """FLUX's, which takes the plan from the rotary embedding where that brings one."""

    def joint(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        image_rotary_emb: tuple[Any, ...] | None,
        plan: CallPlan | None,
    ) -> tuple[Tensor, int, Tensor]:
        """See ``FluxWindowProcessor.joint``."""
        rotary = None
        if image_rotary_emb is not None:
            cos, sin, *carried = image_rotary_emb
            rotary, plan = (cos, sin), carried[0] if carried else plan
        return super().joint(attn, hidden_states, encoder_hidden_states, rotary, plan)


class ChromaIPWindowProcessor(ChromaWindowProcessor, FluxIPWindowProcessor):
    """The same beside an IP-Adapter; see ``FluxIPWindowProcessor``."""
