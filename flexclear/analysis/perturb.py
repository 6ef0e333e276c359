"""How a model depends on positions: clip the relative distances that rotary embeddings see from above or below.

With rotary embeddings the score of query i and key j is, summed over the frequencies w of each axis, the real part of
``q conj(k) exp(1j w d)``, where d is the difference of their coordinates on that axis. Clipping replaces d with d' for every
(query, key) pair of image tokens, on each axis separately:

- remote, at c: d' = d if abs(d) <= c, else c with d's sign. Nothing is farther than c any more.
- local, at c: d' = d if abs(d) >= c, else c with d's sign; d = 0 becomes +c. Nothing is nearer than c any more.

No assignment of positions to tokens gives such differences, so rotating queries and keys once is not enough. But ``exp(1j w d')
= exp(1j w d) exp(1j w (d' - d))``, and on one axis d' - d depends only on two rows (or two columns). So the queries of one row,
already rotated as usual, are rotated by the correction for each row of keys, and those of each column for each column of keys.
This is exact for every pair, at about the arithmetic of plain attention. Content does not change, and neither do pairs with
text, whose positions are not places in the image.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexclear.analysis.attending import attending
from flexclear.families import family_of
from flexclear.families.target import model_of
from flexclear.masks import Layout
from flexclear.masks.checks import check_int
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.hooks import entry_hook_of
from flexclear.runtime.processors import WindowProcessor

KINDS = ("remote", "local")
KNOWN = ("FluxTransformer2DModel",)
"""Models whose rotary embedding rotates pairs of neighboring channels over (index, row, column)."""


@dataclass(frozen=True)
class Clip:
    """How relative distances are clipped; see above.

    Args:
        kind: ``"remote"``: at most ``distance``; ``"local"``: at least ``distance``.
        distance: in tokens, 0 or more.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """

    kind: str
    distance: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"clip must be one of {list(KINDS)}, got {self.kind!r}")
        check_int("clip distance", self.distance, 0, None, "in tokens")

    def __call__(self, difference: Tensor) -> Tensor:
        """Clip differences of coordinates; keeps their type."""
        if self.kind == "remote":
            return difference.clamp(-self.distance, self.distance)
        sign = torch.where(difference < 0, -1, 1).to(difference.dtype)
        return sign * difference.abs().clamp_min(self.distance)

    @property
    def title(self) -> str:
        return f"{self.kind} distances clipped at {self.distance}"


def clipped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    axes: Sequence[int],
    theta: float,
    clip: Clip,
    gain: Tensor | None = None,
) -> Tensor:
    """Dense softmax attention in which image pairs have clipped relative positions.

    Args:
        query, key, value: ``[B, heads, N, head_dim]`` after rotary embedding, text and image in raster order.
        layout: the sequence, with one grid.
        axes: number of channels for the index, for rows, and for columns.
        theta: base of the rotary frequencies.
        clip: how to clip distances.
        gain: factor on the queries, or None.

    Returns:
        ``[B, heads, N, head_dim]``. Only the scores of one row of queries are in memory at a time, never N x N.

    Raises:
        ValueError: the layout is tiled or has reference images.
    """
    if layout.order != "raster" or layout.references:
        raise ValueError(f"clipped distances need one grid in raster order, got {layout}")
    height, width, start = layout.height, layout.width, layout.image_start
    scale = 1 / math.sqrt(query.shape[-1])
    if gain is not None:
        query = query * gain
    image = slice(start, start + layout.image_len)
    high = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (tokens.to(high) for tokens in (query, key, value))
    out = torch.empty_like(q)
    text = [*range(start), *range(start + layout.image_len, layout.seq_len)]
    if text:
        out[:, :, text] = (q[:, :, text] @ k.transpose(2, 3) * scale).softmax(-1) @ v

    # Complex numbers, one per pair of channels: [B, heads, rows, columns, frequencies].
    parts, at = [], 0
    for size in axes:
        parts.append(slice(at, at + size))
        at += size
    grid_q, grid_k = (tokens[:, :, image].unflatten(2, (height, width)) for tokens in (q, k))
    (_, q_rows, q_columns), (_, k_rows, k_columns) = (
        [torch.view_as_complex(grid[..., part].unflatten(-1, (-1, 2)).contiguous()) for part in parts]
        for grid in (grid_q, grid_k)
    )
    turn_rows, turn_columns = (
        _corrections(side, size, theta, clip, q.device, high) for side, size in ((height, axes[1]), (width, axes[2]))
    )
    # Column corrections are the same for every row.
    index_q, index_k = (grid[..., parts[0]] for grid in (grid_q, grid_k))
    for row in range(height):
        by_index = torch.einsum("bhqc,bhjkc->bhqjk", index_q[:, :, row], index_k)
        turned = q_rows[:, :, row, None] * turn_rows[row, :, None]  # [B, heads, key rows, columns, frequencies]
        by_row = torch.einsum("bhjqf,bhjkf->bhqjk", turned, k_rows.conj()).real
        turned = q_columns[:, :, row, :, None] * turn_columns  # [B, heads, columns, key columns, frequencies]
        by_column = torch.einsum("bhqkf,bhjkf->bhqjk", turned, k_columns.conj()).real
        queries = slice(start + row * width, start + (row + 1) * width)
        scores = q[:, :, queries] @ k.transpose(2, 3)
        scores[..., image] = (by_index + by_row + by_column).flatten(3)
        out[:, :, queries] = (scores * scale).softmax(-1) @ v
    return out.to(query.dtype)


def _corrections(
    side: int, channels: int, theta: float, clip: Clip, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """exp(1j w (d' - d)) for every pair of rows, or columns: complex ``[side, side, channels / 2]``."""
    place = torch.arange(side, dtype=torch.float64)
    difference = place[:, None] - place
    frequencies = theta ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angle = (clip(difference) - difference)[..., None] * frequencies
    kind = torch.complex128 if dtype == torch.float64 else torch.complex64
    return torch.polar(torch.ones_like(angle), angle).to(device, kind)


@contextlib.contextmanager
def clipped_distances(model_or_pipe: Any, clip: Clip) -> Iterator[None]:
    """Clip the relative distances that every attention layer sees inside the block.

    >>> flexclear.transform(pipe, None, backend="sdpa", order="raster")      # doctest: +SKIP
    >>> with clipped_distances(pipe, Clip("remote", 16)):                    # doctest: +SKIP
    ...     pipe(prompt)

    Args:
        model_or_pipe: FLUX.1, transformed dense (``flexclear.transform(pipe, None, backend="sdpa", order="raster")``).
        clip: how to clip distances.

    Raises:
        ValueError: it is another model, is transformed differently, or is already inside such a block.
    """
    model = model_of(model_or_pipe)
    family = family_of(model)
    if family.model_class not in KNOWN:
        raise ValueError(f"clipped distances are defined for {', '.join(KNOWN)}, got {type(model).__name__}")
    entry = entry_hook_of(model)
    settings = None if entry is None else entry.settings
    plain = settings is not None and settings.formula is None and not any(settings.windows.values())
    if settings is None or not plain or settings.order != "raster" or settings.backend != "sdpa":
        raise ValueError(
            "clipped distances need the dense model in raster order: "
            "flexclear.transform(model, None, backend='sdpa', order='raster')"
        )
    embed: Any = model.pos_embed

    def attend(
        name: str, processor: WindowProcessor, plan: CallPlan, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        assert processor.slot is not None
        if plan.rotary is not None:
            raise ValueError("clipped distances are defined for the model's own frequencies; leave ntk_factor out")
        mask = plan.slots[processor.slot].mask
        if isinstance(mask, Tensor) and not bool(mask.all()):
            raise ValueError(
                "clipped distances are over all tokens, and the attention_mask of this call hides some of the text; leave it out"
            )
        query, key, value = (tokens.transpose(1, 2) for tokens in (query, key, value))
        gain = plan.slots[processor.slot].gain
        out = clipped_attention(query, key, value, plan.base.layout, embed.axes_dim, embed.theta, clip, gain)
        return out.transpose(1, 2).to(query.dtype)

    with attending({layer.name: layer.module.processor for layer in family.layers(model)}, attend):
        yield
