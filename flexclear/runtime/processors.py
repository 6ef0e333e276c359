"""What the windowed attention processors of all families share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.modes import scores_skipped

PLAN = "flexclear_plan"
"""Name under which the plan reaches every processor."""


def is_ours(processor: Any) -> bool:
    """Whether ``processor`` is of a class of flexclear's own; a subclass from elsewhere may compute anything."""
    return isinstance(processor, WindowProcessor) and type(processor).__module__.startswith("flexclear.")


class WindowProcessor:
    """An attention processor that attends under the call's plan.

    Attributes:
        slot: which of the plan's masks is this layer's. Layers with the same window share a slot, so that equal blocks
            share one compiled graph. None: diffusers made the processor anew, and the model must be transformed again.
    """

    slot: int | None = None

    _replaced: tuple[Any, ...] = ()

    @property
    def replaced(self) -> Any | None:
        """The processor in whose place it is, for ``flexclear.restore``; None where diffusers made ours anew."""
        return self._replaced[0] if self._replaced else None

    def replace(self, processor: Any) -> None:
        """Remember ``processor`` as the one replaced."""
        # In a tuple: the weights of an IP-Adapter's processor are registered once, under the names that they have.
        self._replaced = (processor,)

    def attend(self, plan: CallPlan | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Windowed attention, ``[B, N, heads, head_dim]`` in sequence order, as diffusers lays them out.

        Returns:
            ``[B, N, heads * head_dim]``.

        Raises:
            ValueError: no plan: the block was called without the model's entry, where windows are made.
        """
        if plan is None or self.slot is None:
            raise ValueError(
                "a transformed block was called without its window. Call the transformer or the pipeline, whose entry "
                "makes it; flexclear.restore(model) gives the plain block back"
            )
        if scores_skipped():
            return value.flatten(2, 3).to(query.dtype)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        out = plan.attend(self.slot, query, key, value, self.pooling_weight(query.device))
        return out.transpose(1, 2).flatten(2, 3).to(query.dtype)

    def pooling_weight(self, device: torch.device) -> Tensor | None:
        """Pooling weights of a layer with down-sampled keys, on ``device``; None: it has none."""
        return None

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


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[B, N, heads, head_dim]`` with neighbouring channels turned as pairs.

    Args:
        states: queries or keys.
        cos, sin: of each channel's angle, both of a pair alike, broadcast over ``states``.
    """
    # Real numbers where diffusers has complex ones, which Inductor does not fuse; a sum last, because Inductor's
    # FlexAttention on CPU (torch 2.13) does not take a concatenation for its query.
    first, second = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-second, first], dim=-1).flatten(-2)
    return (states.float() * cos + across * sin).to(states.dtype)


def cos_and_sin(frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Tables for ``rotate``, ``[..., head_dim]``, of diffusers' complex ones, ``[..., head_dim / 2]``."""
    return frequencies.real.repeat_interleave(2, dim=-1), frequencies.imag.repeat_interleave(2, dim=-1)
