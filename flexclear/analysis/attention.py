"""Attention in a real run: where each layer's mass lies, and maps of single queries, without N x N scores in memory.

Layers are observed while they attend. Only one histogram per head and one map per chosen query and head are kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from flexclear.analysis.attending import attending
from flexclear.families import family_of
from flexclear.families.target import model_of
from flexclear.runtime.attention import Mask
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.facts import JOINT
from flexclear.runtime.hooks import entry_hook_of
from flexclear.runtime.processors import WindowProcessor
from flexclear.runtime.steps import StepCounter

MAX_NUMBERS = 1 << 23
"""Maximum number of scores in memory: heads x queries x keys."""

Place = tuple[int, int]
"""Row and column of an image token."""


@dataclass(frozen=True)
class Observed:
    """What one attention layer did in one denoising step, first sample.

    Attributes:
        layer: path of the attention module.
        step: number of the step, from 0.
        grid: height and width in tokens.
        mass: share of each head's attention mass, of image queries on image keys, at distances of [0, 1), [1, 2), ... tokens:
            float64 ``[heads, bins]``; each row sums to 1.
        uniform: the same for equal weights on all image keys, ``[bins]``.
        text_share: share of each head's mass of image queries that is on text: ``[heads]``.
        maps: weights of the image keys, in raster order, for chosen queries and all heads: ``[heads, height, width]``. Together
            with the weights of text they sum to 1.
    """

    layer: str
    step: int
    grid: tuple[int, int]
    mass: Tensor
    uniform: Tensor
    text_share: Tensor
    maps: dict[Place, Tensor] = field(default_factory=dict)

    def within(self, distance: int) -> float:
        """Share of the mass on image keys nearer than ``distance`` tokens, averaged over heads."""
        return float(self.mass[:, :distance].sum(1).mean())


@contextlib.contextmanager
def observe(
    model_or_pipe: Any,
    layers: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    queries: Sequence[Place] = (),
) -> Iterator[list[Observed]]:
    """Yield a list that fills as the model is called inside the block.

    >>> with observe(pipe, steps=[10], queries=[(32, 32)]) as found:          # doctest: +SKIP
    ...     pipe(prompt)

    Args:
        model_or_pipe: transformed; ``flexclear.transform(pipe, None)`` leaves it dense. A bare model counts its calls as steps.
            If a step makes several calls (guidance with two prompts), the first one counts.
        layers: paths of attention modules; by default all that attend over both text and image.
        steps: numbers of denoising steps, from 0; by default all.
        queries: row and column of image tokens whose maps are kept.

    Raises:
        ValueError: it is not transformed, makes videos, attends by a formula or over pooled keys, has no such layer, is already
            observed, or, in a call, a query is outside the image.
    """
    model = model_of(model_or_pipe)
    if family_of(model).video:
        raise ValueError(f"{type(model).__name__} makes videos, and maps and distances are those of one image")
    entry = entry_hook_of(model)
    if entry is None:
        raise ValueError(
            f"this {type(model).__name__} is not transformed; flexclear.transform(model, None) leaves it dense"
        )
    if entry.settings.formula is not None:
        raise ValueError(f"attention={entry.settings.formula.kind!r} has no softmax weights over keys to observe")
    joint = [layer.name for layer in family_of(model).layers(model) if layer.scope == JOINT]
    chosen = joint if layers is None else list(layers)
    unknown = [name for name in chosen if name not in joint]
    if unknown:
        raise ValueError(f"no joint attention layer {unknown[0]!r}; there are {joint[0]!r} to {joint[-1]!r}")
    processors: dict[str, Any] = {name: model.get_submodule(name).processor for name in chosen}
    pooled = [name for name, own in processors.items() if own.pooling_weight(torch.device("cpu")) is not None]
    if pooled:
        raise ValueError(f"{pooled[0]} has pooled keys, which have no position and no distance")
    counter = None if isinstance(model_or_pipe, nn.Module) else StepCounter(model_or_pipe)
    found: list[Observed] = []
    seen: set[tuple[str, int]] = set()
    calls = dict.fromkeys(chosen, 0)

    def watch(
        name: str, processor: WindowProcessor, plan: CallPlan, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        step = calls[name] if counter is None else counter.current()[0]
        calls[name] += 1
        asked = (steps is None or step in steps) and (name, step) not in seen
        if asked and processor.slot is not None:
            seen.add((name, step))
            found.append(_look(name, step, plan, processor.slot, query, key, queries))
        return WindowProcessor.attend(processor, plan, query, key, value)

    with attending(processors, watch):
        yield found


@torch.no_grad()
def _look(
    name: str, step: int, plan: CallPlan, slot: int, query: Tensor, key: Tensor, queries: Sequence[Place]
) -> Observed:
    layout = plan.base.layout
    for row, column in queries:
        if not (0 <= row < layout.height and 0 <= column < layout.width):
            raise ValueError(f"query {row} x {column} is outside of the {layout.height} x {layout.width} image tokens")
    query, key = (tokens[0].transpose(0, 1).float() for tokens in (query, key))  # [heads, N, head_dim]
    scale = 1 / math.sqrt(query.shape[-1])
    gain = plan.slots[slot].gain
    if gain is not None:
        query = query * gain.to(query.device)
    own = layout.height * layout.width  # Reference images follow the image's own tokens.
    start, heads = layout.image_start, len(query)
    rows, columns = (axis[:own].double() for axis in (plan.base.rows, plan.base.columns))
    text = slice(0, start) if layout.text_first else slice(layout.image_len, layout.seq_len)
    bins = math.isqrt((layout.height - 1) ** 2 + (layout.width - 1) ** 2) + 1
    mass = torch.zeros(heads, bins, dtype=torch.float64, device=query.device)
    equal = torch.zeros(bins, dtype=torch.float64, device=query.device)
    on_text = torch.zeros(heads, dtype=torch.float64, device=query.device)
    wanted = {int(r * layout.width + c): (r, c) for r, c in queries}
    raster = (rows * layout.width + columns).long()
    maps: dict[Place, Tensor] = {}
    at_once = max(MAX_NUMBERS // (heads * key.shape[1]), 1)
    for part in torch.arange(own, device=query.device).split(at_once):
        scores = query[:, start + part] @ key.transpose(1, 2) * scale
        allowed = _rows_of(plan.slots[slot].mask, start + part, key.shape[1])
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        weights = scores.softmax(-1)
        on_text += weights[..., text].double().sum((1, 2))
        image = weights[..., start : start + own].double()
        distance = ((rows[part, None] - rows).square() + (columns[part, None] - columns).square()).sqrt()
        near = distance.long().flatten()
        mass.index_add_(1, near, image.flatten(1))
        equal += torch.bincount(near, minlength=bins).double()
        for place, number in enumerate(raster[part].tolist()):
            if number in wanted:
                kept = torch.empty(heads, own)
                kept[:, raster.cpu()] = image[:, place].float().cpu()
                maps[wanted[number]] = kept.view(heads, layout.height, layout.width)
    ordered = {place: maps[place] for place in dict.fromkeys(wanted.values())}
    share = mass / mass.sum(1, keepdim=True)
    return Observed(
        layer=name,
        step=step,
        grid=(layout.height, layout.width),
        mass=share.cpu(),
        uniform=(equal / equal.sum()).cpu(),
        text_share=(on_text / own).cpu(),
        maps=ordered,
    )


def _rows_of(mask: Mask, queries: Tensor, keys: int) -> Tensor | None:
    """Which keys these queries see in the first sample and head: bool ``[queries, keys]``; None: all."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        while mask.ndim > 2:
            mask = mask[0]
        return mask.expand(queries.numel(), keys) if mask.shape[0] == 1 else mask[queries]
    zero = torch.zeros((), dtype=torch.int32, device=queries.device)
    key = torch.arange(keys, device=queries.device, dtype=torch.int32)
    return mask.mask_mod(zero, zero, queries[:, None].to(torch.int32), key[None]).expand(len(queries), keys)


def attention_pictures(
    picture: Image.Image, observed: Observed, heads: Sequence[int] | None = None, cell: int = 224
) -> Image.Image:
    """Draw maps over the generated image: one row per query, one column per head and one for their mean.

    Each map is scaled to its own largest weight; a ring marks the query.

    Raises:
        ValueError: there are no maps, or no such head.
    """
    from flexclear.images.sheet import contact_sheet

    if not observed.maps:
        raise ValueError("no maps were kept: name queries, such as queries=[(8, 8)]")
    count = len(observed.mass)
    chosen = list(range(count)) if heads is None else list(heads)
    wrong = [head for head in chosen if not 0 <= head < count]
    if wrong:
        raise ValueError(f"{observed.layer} has heads 0 to {count - 1}, got {wrong[0]}")
    picture = picture.convert("RGB")
    rows = []
    for query, maps in observed.maps.items():
        shown = [*(maps[head] for head in chosen), maps.mean(0)]
        rows.append([_over(picture, one, query, cell) for one in shown])
    labels = [f"query {row} x {column}, {observed.layer}, step {observed.step}" for row, column in observed.maps]
    return contact_sheet(rows, labels, [*(f"head {head}" for head in chosen), "mean"], cell)


def _over(picture: Image.Image, weights: Tensor, query: Place, cell: int) -> Image.Image:
    """The image in gray, with the weights in color over it."""
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    base = np.asarray(picture.convert("L").convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    share = (weights / weights.max().clamp_min(1e-30)).sqrt().numpy()
    large = Image.fromarray(share, mode="F").resize(size, Image.Resampling.NEAREST)
    heat = np.asarray(large)[..., None]
    colour = np.concatenate([np.full_like(heat, 255), 220 * heat, np.zeros_like(heat)], axis=-1)
    mixed = Image.fromarray((base * (1 - 0.85 * heat) + colour * 0.85 * heat).clip(0, 255).astype(np.uint8))
    height, width = weights.shape
    x, y = ((query[1] + 0.5) * size[0] / width, (query[0] + 0.5) * size[1] / height)
    ring = max(3, cell // 48)
    ImageDraw.Draw(mixed).ellipse((x - ring, y - ring, x + ring, y + ring), outline="cyan", width=2)
    return mixed


def mass_table(found: Sequence[Observed]) -> str:
    """Markdown table of the mass within some distances, and that of equal weights, for every layer and step."""
    lines = [
        "| layer | step | nearer than 2 | 4 | 8 | 16 tokens | equal weights: 2 | 4 | 8 | 16 | on text |",
        "|" + "---|" * 11,
    ]
    for one in found:
        own = [f"{one.within(distance):.1%}" for distance in (2, 4, 8, 16)]
        flat = [f"{float(one.uniform[:distance].sum()):.1%}" for distance in (2, 4, 8, 16)]
        lines.append(f"| {one.layer} | {one.step} | {' | '.join(own + flat)} | {float(one.text_share.mean()):.1%} |")
    return "\n".join(lines) + "\n"
