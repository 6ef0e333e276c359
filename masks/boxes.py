"""Bounding boxes of blocks, and the search for pairs of boxes that a window lets touch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexclear.masks.coordinates import PADDING, POOLED, TEXT
from flexclear.masks.windows import FAR, Box

_GROUP = 32
_FEW_PAIRS = 1 << 20

Touch = Callable[[Box, Box], Tensor]
"""Whether pairs of boxes may hold an allowed pair of tokens: bool, broadcast."""


@dataclass(frozen=True)
class Blocks:
    """One axis of the attention matrix cut into blocks.

    Attributes:
        box: around the image tokens of each block; empty where there are none.
        image, text, pooled: whether a block holds any token of the kind, bool ``[blocks]``.
        whole: whether it lies inside the sequence entirely.
    """

    box: Box
    image: Tensor
    text: Tensor
    pooled: Tensor
    whole: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def boxes(self, index: Tensor) -> Box:
        """The boxes of some blocks."""
        return map_box(lambda edge: edge[index], self.box)


def cut(coordinates: Tensor, size: int) -> Blocks:
    """Blocks of ``size`` tokens of an axis given by its packed coordinates, int32 ``[tokens]``."""
    count = -(-len(coordinates) // size)
    padded = coordinates.new_full((count * size,), PADDING)
    padded[: len(coordinates)] = coordinates
    tokens = padded.view(count, size)
    elsewhere = tokens < 0
    y, x = tokens >> 16, tokens & 0xFFFF
    return Blocks(
        box=(
            y.masked_fill(elsewhere, FAR).amin(1),
            y.masked_fill(elsewhere, -FAR).amax(1),
            x.masked_fill(elsewhere, FAR).amin(1),
            x.masked_fill(elsewhere, -FAR).amax(1),
        ),
        image=~elsewhere.all(1),
        text=(tokens == TEXT).any(1),
        pooled=(tokens == POOLED).any(1),
        whole=(tokens != PADDING).all(1),
    )


def map_box(function: Callable[..., Tensor], box: Box) -> Box:
    """``function`` of each edge."""
    return function(box[0]), function(box[1]), function(box[2]), function(box[3])


def near_pairs(touches: Touch, query: Box, key: Box) -> tuple[Tensor, Tensor]:
    """Indices of the pairs of boxes that touch: two int64 ``[pairs]``, in no particular order.

    Few boxes: all pairs are asked. Many: boxes around groups of consecutive boxes first, then inside the groups that
    touch. Consecutive blocks lie near each other, so the work is linear in the number of blocks.
    """
    if len(query[0]) * len(key[0]) <= _FEW_PAIRS:
        q_part, kv_part = map_box(lambda edge: edge[:, None], query), map_box(lambda edge: edge[None, :], key)
        q, kv = torch.nonzero(touches(q_part, kv_part), as_tuple=True)
        return q, kv
    q_rows, kv_rows = _in_groups(query), _in_groups(key)
    q_group, kv_group = near_pairs(touches, _around(q_rows), _around(kv_rows))
    found_q, found_kv = [], []
    at_once = 1 + _FEW_PAIRS // _GROUP**2
    for q_some, kv_some in zip(q_group.split(at_once), kv_group.split(at_once), strict=True):
        q_part = map_box(lambda rows, some=q_some: rows[some, :, None], q_rows)
        kv_part = map_box(lambda rows, some=kv_some: rows[some, None, :], kv_rows)
        pair, q, kv = torch.nonzero(touches(q_part, kv_part), as_tuple=True)
        q, kv = q_some[pair] * _GROUP + q, kv_some[pair] * _GROUP + kv
        real = (q < len(query[0])) & (kv < len(key[0]))
        found_q.append(q[real])
        found_kv.append(kv[real])
    return torch.cat(found_q), torch.cat(found_kv)


def _in_groups(box: Box) -> Box:
    """Boxes cut into rows of ``_GROUP``, the last row filled with empty boxes: four ``[groups, _GROUP]``."""
    count = -(-len(box[0]) // _GROUP)
    rows = []
    for edge, empty in zip(box, (FAR, -FAR, FAR, -FAR), strict=True):
        padded = edge.new_full((count * _GROUP,), empty)
        padded[: len(edge)] = edge
        rows.append(padded.view(count, _GROUP))
    return rows[0], rows[1], rows[2], rows[3]


def _around(rows: Box) -> Box:
    """One box around each row of boxes."""
    return rows[0].amin(1), rows[1].amax(1), rows[2].amin(1), rows[3].amax(1)
