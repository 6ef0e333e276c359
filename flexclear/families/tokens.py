"""Models that take image tokens and their position ids, like FLUX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.checks import refuse_mask, required_tensor
from flexclear.runtime.facts import JOINT, Call
from flexclear.runtime.family import Family
from flexclear.runtime.grid import AXES, Axes, GridReader, Grids, exact_ids
from flexclear.runtime.rotary import Rotary
from flexclear.runtime.switches import Switches


@dataclass(frozen=True)
class TokensFamily(Family):
    """A model that takes ``hidden_states`` ``[B, tokens, C]`` and position ids for them.

    Attributes:
        ids: argument with the ids, ``[tokens, axes]``.
        axes: the meaning of the ids' columns.
        joint_ids: whether the text's ids come first in the same argument.
        text: argument with the text's features, ``[B, tokens, C]``.
        text_ids: argument with the text's ids, for a model whose rotary embedding an NTK factor can stretch.
        embed: path of the module that makes the rotary embedding from the ids.
        residuals: arguments with a ControlNet's residuals, one row per image token.
        attention_kwargs: argument that is passed to the processors.
        text_mask: whether ``attention_kwargs`` may hold an ``attention_mask``, bool ``[B or 1, 1, 1, text + image]``, False
            for padding; otherwise a mask is refused.
        refused: arguments that no window supports, and why.
    """

    ids: str = "img_ids"
    axes: Axes = AXES
    joint_ids: bool = False
    text: str = "encoder_hidden_states"
    text_ids: str = "txt_ids"
    embed: str = "pos_embed"
    residuals: tuple[str, ...] = ()
    attention_kwargs: str = "joint_attention_kwargs"
    text_mask: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        tokens, text, ids = (required_tensor(kwargs, name, model) for name in ("hidden_states", self.text, self.ids))
        given = kwargs.get(self.attention_kwargs) or {}
        if not self.text_mask:
            refuse_mask(given, self.attention_kwargs)
        for name, reason in self.refused.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"a transformed {type(model).__name__} got {name}: {reason}")
        found = grids(ids, self.axes, text.shape[1] if self.joint_ids else 0)
        check_tokens(model, kwargs, found)
        check_residuals(kwargs, self.residuals)
        call = Call(tokens, found, {JOINT: text.shape[1]})
        mask = given.get("attention_mask")
        keep = None if mask is None else self._kept(mask, text, tokens, grids)
        return call if keep is None else replace(call, keep={JOINT: keep})

    def _kept(self, mask: Any, text: Tensor, tokens: Tensor, reader: GridReader) -> Tensor | None:
        """Which text tokens the mask among the processors' arguments keeps, bool ``[B, text_len]``; None: all.

        Raises:
            ValueError: it is not a mask of padded text.
        """
        batch, count, where = (
            len(tokens),
            text.shape[1] + tokens.shape[1],
            f"the attention_mask in {self.attention_kwargs}",
        )
        shapes = ((batch, 1, 1, count), (1, 1, 1, count))
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape not in shapes:
            given = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(
                f"{where} must be a bool tensor of shape {shapes[0]} (batch, 1, 1, text and image), False for padding, got "
                f"{given}"
            )
        return kept_text(mask, where, text, tokens, reader)

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, switches: Switches
    ) -> tuple[dict[str, Any], CallPlan]:
        changed = self.permuted(kwargs, plan, exact_ids)
        if switches.ntk_factor != 1:
            plan = replace(plan, rotary=self.stretched(model, changed, switches))
        return changed, plan

    def permuted(self, kwargs: dict[str, Any], plan: CallPlan, exact: bool) -> dict[str, Any]:
        """Arguments in the plan's order: image tokens, their ids, ControlNet residuals."""
        changed = {**kwargs, "hidden_states": plan.to_image_order(kwargs["hidden_states"])}
        others = kwargs.get(self.attention_kwargs)
        if others and "attention_mask" in others:  # The plan has the mask.
            changed[self.attention_kwargs] = {name: each for name, each in others.items() if name != "attention_mask"}
        given = kwargs[self.ids]
        text, image = given.tensor_split((kwargs[self.text].shape[1] if self.joint_ids else 0,), dim=-2)
        ids = plan.to_image_order(image, dim=-2)
        if exact:
            # Some families need batched ids (FLUX.2); the batch shares its grid.
            first, ids = (tensor[0] if given.ndim == 3 else tensor for tensor in (image, ids))
            ids = exact_ids(ids, plan.base.rows, plan.base.columns, self.axes, first[0])
            ids = ids if given.ndim == 2 else ids[None].expand(len(given), -1, -1)
        changed[self.ids] = torch.cat([text.to(ids.dtype), ids], dim=-2) if self.joint_ids else ids
        for name in self.residuals:
            if kwargs.get(name) is not None:
                changed[name] = [plan.to_image_order(residual) for residual in kwargs[name]]
        return changed

    def stretched(self, model: nn.Module, kwargs: dict[str, Any], switches: Switches) -> Rotary:
        """The rotary embedding with a larger base, for arguments that ``permuted`` returned."""
        embed: Any = model.get_submodule(self.embed)
        names = (self.ids,) if self.joint_ids else (self.text_ids, self.ids)
        *text, image = (kwargs[name][0] if kwargs[name].ndim == 3 else kwargs[name] for name in names)
        ids = torch.cat([*(part.to(image.dtype) for part in text), image])
        if switches.ntk_floor:
            cos, sin = _clipped(ids, embed.axes_dim, embed.theta, switches.ntk_factor, switches.ntk_floor)
        else:
            cos, sin = type(embed)(theta=embed.theta * switches.ntk_factor, axes_dim=embed.axes_dim)(ids)
        return cos[None, :, None], sin[None, :, None]


def check_tokens(
    model: nn.Module,
    kwargs: dict[str, Any],
    grids: Grids,
    source: str = "the position ids describe",
    name: str = "hidden_states",
) -> None:
    """Raise unless the argument ``name`` holds as many tokens as the grids have; ``source`` says where the grids come from.

    Raises:
        ValueError: they do not.
    """
    tokens = kwargs[name]
    expected = sum(height * width for height, width in grids)
    if tokens.ndim != 3 or tokens.shape[1] != expected:
        sizes = " + ".join(f"{height} x {width}" for height, width in grids)
        raise ValueError(
            f"{name} of shape {tuple(tokens.shape)} do not hold the {sizes} = {expected} image tokens that "
            f"{source}; [batch, tokens, channels] is expected"
        )


def check_residuals(kwargs: dict[str, Any], names: tuple[str, ...]) -> None:
    """Raise unless a ControlNet's residuals have a row for each token of ``hidden_states``, which has been checked.

    Without this check, permuting residuals that are too long would silently use their first rows.

    Raises:
        ValueError: they do not.
    """
    length = kwargs["hidden_states"].shape[1]
    for name in names:
        residuals = kwargs.get(name)
        for number, residual in enumerate(() if residuals is None else residuals):
            if residual.ndim != 3 or residual.shape[1] != length:
                raise ValueError(
                    f"{name}[{number}] of shape {tuple(residual.shape)} does not hold one residual for each of the {length} "
                    "tokens of hidden_states"
                )


def kept_text(mask: Tensor, name: str, text: Tensor, tokens: Tensor, reader: GridReader) -> Tensor | None:
    """Which text tokens a mask over text and image keeps, bool ``[B, text_len]``; None if it keeps all.

    Args:
        mask: bool ``[B or 1, ..., text + image]`` with axes of size 1 in between.
        name: name of the mask's argument.
        text, tokens: the call's text features and image tokens.
        reader: remembers what was read.

    Raises:
        ValueError: it hides image tokens.
    """
    text_len, image_len = text.shape[1], tokens.shape[1]
    last = reader.once(mask, _last_hidden)
    if last >= text_len:
        raise ValueError(
            f"{name} hides image tokens (the last one that it hides is number {last - text_len} of {image_len}). "
            "The window decides which image tokens are seen; the mask can only hide text"
        )
    return None if last < 0 else mask.flatten(0, -2)[:, :text_len].expand(len(tokens), -1)


def _last_hidden(mask: Tensor) -> int:
    """The last token that a bool mask ``[..., N]`` hides in any sample; -1 if it hides none."""
    hidden = torch.nonzero((~mask).flatten(0, -2).any(dim=0))[:, 0]
    return int(hidden[-1]) if len(hidden) else -1


def _clipped(ids: Tensor, axes: Sequence[int], theta: float, ntk_factor: float, floor: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[N, head_dim]``, float32, in which no frequency is below ``floor`` times that of ``theta``."""
    dtype = torch.float32 if ids.device.type in ("mps", "npu") else torch.float64
    angles = []
    for axis, dim in enumerate(axes):
        exponents = torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim
        frequencies = torch.maximum((theta * ntk_factor) ** -exponents, floor * theta**-exponents)
        angles.append(torch.outer(ids[:, axis].to(dtype), frequencies).repeat_interleave(2, dim=1))
    angle = torch.cat(angles, dim=1)
    return angle.cos().float(), angle.sin().float()
