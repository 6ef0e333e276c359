"""Windowed attention processors for Z-Image, and how its plan reaches them; imported when a model is transformed."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import RopeEmbedder, ZSingleStreamAttnProcessor
from torch import Tensor, nn

from flexclear.families.zimage_pads import pads_of, room_for
from flexclear.masks.defaults import independent
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.hooks import Hook
from flexclear.runtime.modes import known_to_hooks
from flexclear.runtime.plan import Plan
from flexclear.runtime.processors import PLAN, WindowProcessor, cos_and_sin, rotate

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, float32 ``[B or 1, N, 1, head_dim]``, each twice in a row."""


@dataclass(frozen=True, eq=False)
class Timestep:
    """What the entry hands to the model as ``t``; its product with the model's time scale carries the plan.

    Attributes:
        value: the caller's ``t``, ``[B]``.
        plan: the call's plan.
        dtype: type of the latents, which the model gives to the embedding of ``t``.
    """

    value: Tensor
    plan: CallPlan
    dtype: torch.dtype

    def __mul__(self, scale: float) -> Tensor:
        product = self.value * scale
        setattr(product, PLAN, self)
        return product

    def to(self, *args: Any, **kwargs: Any) -> Timestep:
        """On another device, as hooks that move a call's arguments ask for."""
        return replace(self, value=self.value.to(*args, **kwargs))


class PlanToEmbedding(Hook):
    """Forward hook on ``t_embedder``: the embedding carries the plan that the input carries."""

    after = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        time = getattr(args[0], PLAN, None) if args else None
        if time is not None:
            # In its final type here, because a cast inside the model would make another tensor, without the plan.
            output = output.to(time.dtype)
            setattr(output, PLAN, time.plan)
        return output


class PlanToBlock(Hook):
    """Forward pre-hook on a block: the plan off the embedding of ``t``, in the place of ``freqs_cis``."""

    NAMES = ("x", "attn_mask", "freqs_cis", "adaln_input")

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**kwargs, **dict(zip(self.NAMES, args, strict=False))}
        plan = getattr(given.get("adaln_input"), PLAN, None)
        if plan is None:
            return args, kwargs
        rest = {name: value for name, value in kwargs.items() if name not in self.NAMES}
        return (given["x"], None, plan, given["adaln_input"], *args[len(self.NAMES) :]), rest


class PadsOfBand(Hook):
    """Forward pre-hook on the first windowed block: behind a rank's tokens the pads of the whole picture, in place of those
    that the model has given the rank's own. All pads are one parameter at one position.

    Attributes:
        before_captions: whether captions follow, as they do where there is no noise refiner.
    """

    def __init__(self, before_captions: bool) -> None:
        self.before_captions = before_captions

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        plan = args[2] if len(args) > 2 else None
        if not isinstance(plan, CallPlan) or plan.band is None:
            return args, kwargs  # the ControlNet's call of the refiner
        x, own, pads = args[0], len(plan.base.rows), pads_of(plan)
        end = x.shape[1] - (plan.base.layout.text_len - pads if self.before_captions else 0)
        parts = [x[:, :own], x[:, end - 1 : end].expand(-1, pads, -1), x[:, end:]]
        return (torch.cat(parts, 1), *args[1:]), kwargs


class OutputOfBand(Hook):
    """Forward hook on the last layer: as many tokens as the model takes a rank's picture to have, of which those behind the
    rank's own are cut off again at the exit.

    Attributes:
        positions: see ``room_for``.
    """

    after = True

    def __init__(self, positions: tuple[int, ...]) -> None:
        self.positions = positions

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        plan = getattr(kwargs.get("c"), PLAN, None)
        if plan is None or plan.band is None:
            return output
        height, width = room_for(len(plan.base.rows), pads_of(plan), self.positions)
        return torch.nn.functional.pad(output, (0, 0, 0, max(height * width - output.shape[1], 0)))


class ZImageWindowProcessor(WindowProcessor):
    """Attention of a Z-Image block under the plan's window; projections, norms and RoPE as in diffusers' own processor.

    Attributes:
        dense: the processor for calls without a plan, or None. The ControlNet has the transformer's noise refiner for its
            own, and what it does there stays what it was.
    """

    def __init__(self, slot: int | None = None, dense: Any = None) -> None:
        self.slot = slot
        self.dense = dense

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: CallPlan | Tensor | None = None,
    ) -> Tensor:
        """``hidden_states`` ``[B, N, C]``; ``freqs_cis`` the plan, whose masks stand for ``attention_mask``.

        Raises:
            ValueError: no plan.
        """
        plan = freqs_cis if isinstance(freqs_cis, CallPlan) else None
        if plan is None:
            if self.dense is not None:
                return self.dense(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
            raise ValueError(
                "a transformed Z-Image block was called without its window. Call the transformer or the pipeline, whose "
                "entry makes it; flexclear.restore(model) gives the plain block back. If this is gradient checkpointing: "
                "it must hand the block its own tensors again, so not with use_reentrant=True, nor under hooks on saved "
                "tensors such as save_on_cpu"
            )
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        cos, sin = (table[:, : query.shape[1]] for table in plan.rotary)
        out = self.attend(plan, rotate(query, cos, sin), rotate(key, cos, sin), value)
        for layer in attn.to_out:
            out = layer(out)
        return out


known_to_hooks(ZImageWindowProcessor, ZSingleStreamAttnProcessor)


@independent
def rotary(embed: Any, base: Plan, lengths: list[int], ntk_factor: float) -> Rotary:
    """Rotary embedding of the joint sequence: the image in the plan's order, its pads, the caption.

    On the first axis a caption's tokens are numbered from 1 to its length, and all tokens of the picture bear the next
    number; on the others the picture's tokens have row and column. Pads of the picture lie at 0.

    Args:
        embed: the model's ``RopeEmbedder``.
        base: the plan of the joint sequence.
        lengths: tokens of each caption, its padding included.
        ntk_factor: factor on the base of the frequencies.
    """
    if ntk_factor != 1:
        embed = _embedder(embed.theta * ntk_factor, tuple(embed.axes_dims), tuple(embed.axes_lens))
    image = torch.stack([torch.zeros_like(base.rows), base.rows, base.columns], dim=1).long()
    ids = image.new_zeros(len(image) + base.layout.text_len, 3)  # on one of several ranks: its own image tokens
    ids[: len(image)] = image
    start = len(ids) - max(lengths)
    tables = {}
    for length in set(lengths):
        own = ids.clone()
        own[: len(image), 0] = length + 1
        own[start : start + length, 0] = torch.arange(1, length + 1, device=ids.device)
        tables[length] = embed(own)
    table = torch.stack([tables[length] for length in (lengths if len(tables) > 1 else lengths[:1])]).unsqueeze(2)
    return cos_and_sin(table)


@functools.lru_cache(maxsize=8)
def _embedder(theta: float, dims: tuple[int, ...], lens: tuple[int, ...]) -> Any:
    return RopeEmbedder(theta=theta, axes_dims=dims, axes_lens=lens)
