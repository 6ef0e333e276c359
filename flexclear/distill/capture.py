"""Attention outputs of one call, captured by hooks that live as long as the call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flexclear.families import family_of
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.carrying import plan_here

SINGLE = "single_transformer_blocks."


@dataclass(frozen=True)
class Captured:
    """What one attention layer returned.

    Attributes:
        outputs: its output or outputs: text and image together in single-stream blocks; image, then text in others.
        plan: the call's plan if the output is in the plan's order. None: raster order, as for dense layers and for all layers
            of a family whose tokens stay in raster order (``Family.raster``).
    """

    outputs: tuple[Tensor, ...]
    plan: CallPlan | None


def compared_layers(model: nn.Module, every: int) -> list[str]:
    """Names of the attention layers that L_attn compares (method, section 5).

    They are the single-stream layers whose number among *all* attention layers is a multiple of ``every``. Double-stream layers
    are counted first, from 0: with FLUX.1's 19 and 38 layers and ``every`` 4, these are single-stream blocks 1, 5, ..., 37. In
    a model without single-stream blocks, all layers count.

    Raises:
        ValueError: there is no such layer.
    """
    names = [layer.name for layer in family_of(model).layers(model)]
    single = [number for number, name in enumerate(names) if name.startswith(SINGLE)] or range(len(names))
    compared = [names[number] for number in single if number % every == 0]
    if not compared:
        raise ValueError(
            f"losses.attention_every: no multiple of {every} is among the numbers of this {type(model).__name__}'s "
            f"single-stream layers, {single[0]} to {single[-1]} of {len(names)}. Choose a smaller one, or losses.attention: 0"
        )
    return compared


@contextlib.contextmanager
def capture(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Captured]]:
    """Yield a dict that fills with the outputs of these layers when this thread calls the model inside the block.

    Calls of other threads are not recorded, nor is what gradient checkpointing recomputes.
    """
    found: dict[str, Captured] = {}
    thread, raster = threading.get_ident(), family_of(model).raster

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if threading.get_ident() == thread:
                outputs = output if isinstance(output, tuple) else (output,)
                found[name] = Captured(outputs, None if raster else plan_here())

        return hook

    handles = [model.get_submodule(n).register_forward_hook(hook_of(n), with_kwargs=True) for n in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
