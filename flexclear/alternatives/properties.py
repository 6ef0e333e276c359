"""Measures what the paper's Table 1 says about each mechanism: locality, softmax, rank, token integrity.

One attention layer is run on the queries and keys of a real call. Every mechanism here is linear in the values, so values that
are 1 in one token and 0 in all others reveal its attention map, whatever its formula. Everything below is computed from such
maps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.convert import transform
from flexclear.families import family_of
from flexclear.masks import Layout
from flexclear.masks.checks import check_int
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.mechanism import one_grid
from flexclear.runtime.processors import WindowProcessor

RANK_TOLERANCE = 1e-10
"""Singular values below this share of the largest count as zero."""

PROPORTION_TOLERANCE = 1e-6
"""Relative deviation from proportionality allowed for the weights of all other tokens when one key changes."""

MAX_NUMBERS = 1 << 24
"""Maximum size of the probing values at a time."""


@dataclass(frozen=True)
class Captured:
    """What one attention layer worked on in one call.

    Attributes:
        plan: the call's plan.
        slot: index of the layer's mask in the plan.
        query, key: after norms and rotary embedding, float64 ``[1, heads, N, head_dim]``, in sequence order.
        weight: weight of a layer with down-sampled or compressed keys, else None.
    """

    plan: CallPlan
    slot: int
    query: Tensor
    key: Tensor
    weight: Tensor | None

    @property
    def layout(self) -> Layout:
        """The sequence."""
        return self.plan.base.layout


@dataclass(frozen=True)
class Properties:
    """Facts of one attention layer in one call, over all its heads; image queries only.

    Attributes:
        mass_by_distance: share of the attention mass on image keys at distances [0, 1), [1, 2), ... tokens.
        uniform_by_distance: the same if all image keys had equal weight.
        mean_distance: mean distance of the mass on image keys, in tokens.
        relative_distance: that divided by the mean distance under equal weights; 1 means no locality.
        text_share: share of the mass that is on text keys.
        softmax_error: how far weights are from softmax over the original keys that they are on: mean total variation, 0 if the
            formulation is kept, at most 1 for weights that sum to 1, more for others (sigmoid).
        numerical_rank: rank of the image-to-image map, singular values above ``RANK_TOLERANCE``; mean over heads.
        effective_rank: exponential of the entropy of its normalized singular values; mean over heads.
        rank_limit: the number of image tokens.
        intact: share of image tokens that are weighted in their original form: some image query sees the token, and when its
            key changes, all other weights of every query stay in proportion. Pooled tokens drag others along.
    """

    mass_by_distance: tuple[float, ...]
    uniform_by_distance: tuple[float, ...]
    mean_distance: float
    relative_distance: float
    text_share: float
    softmax_error: float
    numerical_rank: float
    effective_rank: float
    rank_limit: int
    intact: float

    def within(self, distance: int) -> float:
        """Share of the mass on image keys that are nearer than ``distance`` tokens."""
        return sum(self.mass_by_distance[:distance])


def capture(model: nn.Module, call: Mapping[str, Any], layer: str) -> Captured:
    """Run a transformed model and keep what one attention layer attends over.

    Args:
        model: transformed, ``backend="sdpa"``.
        call: keyword arguments of the model's call, one sample, one grid.
        layer: path of the attention module, such as ``single_transformer_blocks.3.attn``.

    Raises:
        ValueError: no such layer, the model is not transformed, or the call is more than one sample or grid.
    """
    names = [known.name for known in family_of(model).layers(model)]
    if layer not in names:
        raise ValueError(
            f"layer must be an attention layer of the model, from {names[0]!r} to {names[-1]!r}, got {layer!r}"
        )
    processor = model.get_submodule(layer).processor
    if not isinstance(processor, WindowProcessor):
        raise ValueError(
            f"this {type(model).__name__} is not transformed; flexclear.transform(model, None) leaves it dense"
        )
    found: list[Captured] = []
    attend = processor.attend

    def recording(plan: CallPlan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if processor.slot is not None:
            weight = processor.pooling_weight(query.device)
            found.append(_captured(plan, processor.slot, query, key, weight))
        return attend(plan, query, key, value)

    processor.attend = recording  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            model(**call)
    finally:
        del processor.attend
    if len(found) != 1:
        raise ValueError(f"{layer} attended {len(found)} times in this call; once is expected")
    return found[0]


def _captured(plan: CallPlan, slot: int, query: Tensor, key: Tensor, weight: Tensor | None) -> Captured:
    if len(query) != 1:
        raise ValueError(f"properties are measured on one sample, but this call has {len(query)}")
    one_grid(plan.base.layout, "distance between tokens")
    mask = plan.slots[slot].mask
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            "properties are measured in float64, which FlexAttention does not support: transform with backend='sdpa'"
        )
    query, key = (tokens.detach().transpose(1, 2).double() for tokens in (query, key))
    gain = plan.slots[slot].gain
    if gain is not None:
        query = query * gain
    plan = replace(plan, slots=tuple(replace(each, gain=None) for each in plan.slots))
    return Captured(plan, slot, query, key, None if weight is None else weight.detach().double())


@torch.no_grad()
def attention_map(captured: Captured, key: Tensor | None = None) -> Tensor:
    """Weight of each token's value in each token's output: float64 ``[heads, N, N]``, text first, then raster order.

    Compressed values have separate weights in every channel; the map is then the mean over some channels.

    Args:
        captured: the layer.
        key: keys to use instead of the captured ones.
    """
    key = captured.key if key is None else key
    heads, n, channels = captured.query.shape[1:]
    alike = captured.weight is None or captured.weight.shape[0] == 1
    share = 1 if alike else min(4, channels)
    packed = channels // share
    columns = []
    at_once = max(MAX_NUMBERS // (heads * n * max(channels, n)), 1)
    for numbers in torch.arange(n, device=key.device).split(packed * at_once):
        groups = numbers.split(packed)
        value = key.new_zeros(len(groups), heads, n, channels)
        for place, group in enumerate(groups):
            for offset, token in enumerate(group.tolist()):
                value[place, :, token, offset * share : (offset + 1) * share] = 1
        query, keys = (tokens.expand(len(groups), -1, -1, -1) for tokens in (captured.query, key))
        out = captured.plan.attend(captured.slot, query, keys, value, captured.weight)
        means = out[..., : packed * share].unflatten(-1, (packed, share)).mean(-1)
        columns += [part[..., : len(group)] for part, group in zip(means, groups, strict=True)]
    whole = torch.cat(columns, dim=-1)
    start = captured.layout.image_start
    for dim in (1, 2):
        text, image = whole.tensor_split([start], dim=dim)
        whole = torch.cat([text, captured.plan.to_raster(image, dim=dim)], dim=dim)
    return whole


def measure(captured: Captured, tokens: int = 16) -> Properties:
    """The properties of one attention layer in one call.

    Args:
        captured: the layer; see ``capture``.
        tokens: number of evenly spread image tokens to test for integrity; each costs a map.
    """
    check_int("tokens", tokens, 1, None, "to try for integrity")
    layout, start = captured.layout, captured.layout.image_start
    whole = attention_map(captured)
    image = whole[:, start:]
    to_image = image[..., start:]
    return Properties(
        **_locality(to_image, layout),
        text_share=float(image[..., :start].sum() / image.sum()),
        softmax_error=_softmax_error(captured, whole),
        **_ranks(to_image),
        rank_limit=layout.image_len,
        intact=_intact(captured, whole, tokens),
    )


def _locality(to_image: Tensor, layout: Layout) -> dict[str, Any]:
    _, y, x = (axis.double() for axis in Layout(layout.height, layout.width, 0, order="raster").coordinates())
    distance = (y[:, None] - y).square().add((x[:, None] - x).square()).sqrt().to(to_image.device)
    bins = distance.long().flatten()
    mass = to_image.abs().sum(0)
    by_distance = torch.bincount(bins, mass.flatten()) / mass.sum()
    equal = torch.bincount(bins).double() / bins.numel()
    mean = float((mass * distance).sum() / mass.sum())
    return {
        "mass_by_distance": tuple(by_distance.tolist()),
        "uniform_by_distance": tuple(equal.tolist()),
        "mean_distance": mean,
        "relative_distance": mean / float(distance.mean()) if layout.image_len > 1 else 1.0,
    }


def _ranks(to_image: Tensor) -> dict[str, Any]:
    values = torch.linalg.svdvals(to_image)
    shares = values / values.sum(-1, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(-1)
    return {
        "numerical_rank": float((values > RANK_TOLERANCE * values[:, :1]).double().sum(-1).mean()),
        "effective_rank": float(entropy.exp().mean()),
    }


def _in_raster(captured: Captured, tokens: Tensor) -> Tensor:
    """Reorder ``[1, heads, N, head_dim]`` from sequence order to ``[heads, N, head_dim]``, text first, then raster order."""
    text, image = tokens[0].tensor_split([captured.layout.image_start], dim=1)
    return torch.cat([text, captured.plan.to_raster(image, dim=1)], dim=1)


def _softmax_error(captured: Captured, whole: Tensor) -> float:
    query, key = (_in_raster(captured, tokens) for tokens in (captured.query, captured.key))
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    expected = scores.masked_fill(whole == 0, -math.inf).softmax(-1)
    apart = (whole - expected)[:, captured.layout.image_start :].abs().sum(-1) / 2
    return float(apart.mean())


def _intact(captured: Captured, whole: Tensor, tokens: int) -> float:
    layout, start = captured.layout, captured.layout.image_start
    tried = torch.linspace(0, layout.image_len - 1, min(tokens, layout.image_len)).round().long().unique().tolist()
    place = layout.inverse_permutation()
    before, kept = whole[:, start:], 0
    for token in tried:
        key = captured.key.clone()
        key[:, :, start + int(place[token])] *= -1
        after = attention_map(captured, key)[:, start:]
        seen = bool((before[..., start + token].abs().amax() > 0) | (after[..., start + token].abs().amax() > 0))
        # For all other keys with weight: the factor by which it changed. In proportion means the same factor for all.
        others = before.abs() > 1e-12 * before.abs().amax(-1, keepdim=True)
        others[..., start + token] = False
        factor = after / torch.where(others, before, 1)
        most = factor.masked_fill(~others, -math.inf).amax(-1)
        least = factor.masked_fill(~others, math.inf).amin(-1)
        any_left = others.any(-1)
        kept += seen and bool(((most - least)[any_left] <= PROPORTION_TOLERANCE * most[any_left].abs()).all())
    return kept / len(tried)


def compare(
    model: nn.Module, call: Mapping[str, Any], layer: str, rows: Mapping[str, Mapping[str, Any]], tokens: int = 16
) -> dict[str, Properties]:
    """Measure several mechanisms on the queries and keys of one layer of the dense model in one call.

    Args:
        model: transformed or not; it is not changed.
        call: keyword arguments of the model's call, one sample.
        layer: path of the attention module.
        rows: arguments of ``flexclear.transform`` by the row's title; ``{"r": None}`` is dense attention.
        tokens: see ``measure``.
    """
    own = copy.deepcopy(model)
    fixed = {"backend": "sdpa", "order": "raster"}
    transform(own, None, **fixed)  # type: ignore[arg-type]
    dense = capture(own, call, layer)
    found = {}
    for title, options in rows.items():
        transform(own, **{**options, **fixed})
        at_layer = capture(own, call, layer)
        found[title] = measure(replace(at_layer, query=dense.query, key=dense.key), tokens)
    return found


def table(rows: Mapping[str, Properties], near: int = 4) -> str:
    """Format the result of ``compare`` as Markdown. ``near`` is the distance in tokens that counts as near."""
    lines = [
        f"| attention | mass nearer than {near} tokens | mean distance / uniform | distance from softmax | numerical rank | "
        "effective rank | tokens in original form |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, row in rows.items():
        lines.append(
            f"| {title} | {row.within(near):.0%} | {row.relative_distance:.2f} | {row.softmax_error:.3f} | "
            f"{row.numerical_rank:.0f} of {row.rank_limit} | {row.effective_rank:.0f} | {row.intact:.0%} |"
        )
    return "\n".join(lines) + "\n"
