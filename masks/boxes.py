"""Bounding boxes of blocks, and the search for pairs of boxes between which a window may allow a pair of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexclear.masks.places import FAR, PADDING, POOLED, TEXT, Box, Packing

_GROUP = 32
_FEW_PAIRS = 1 << 20

Touch = Callable[[Box, Box], Tensor]
"""Maps pairs of boxes to whether they may hold an allowed pair of tokens: bool, broadcast."""


@dataclass(frozen=True)
class Blocks:
    """One axis of the attention matrix cut into blocks.

    Attributes:
        box: bounding box of the image tokens of each block; empty if it has none.
        image, text, pooled: whether a block holds any token of this kind, bool ``[blocks]``.
        whole: whether a block lies entirely inside the sequence, bool ``[blocks]``.
    """

    box: Box
    image: Tensor
    text: Tensor
    pooled: Tensor
    whole: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def boxes(self, index: Tensor) -> Box:
        """The boxes of the blocks in ``index``."""
        return map_box(lambda edge: edge[index], self.box)


def cut(coordinates: Tensor, packing: Packing, size: int) -> Blocks:
    """Blocks of ``size`` tokens along an axis, given by its packed coordinates, int32 ``[tokens]``."""
    count = -(-len(coordinates) // size)
    padded = coordinates.new_full((count * size,), PADDING)
    padded[: len(coordinates)] = coordinates
    tokens = padded.view(count, size)
    elsewhere = tokens < 0
    frames, rows, columns = (
        (axis.masked_fill(elsewhere, FAR).amin(1), axis.masked_fill(elsewhere, -FAR).amax(1))
        for axis in packing.unpack(tokens)
    )
    return Blocks(
        box=(frames, rows, columns),
        image=~elsewhere.all(1),
        text=(tokens == TEXT).any(1),
        pooled=(tokens == POOLED).any(1),
        whole=(tokens != PADDING).all(1),
    )


def map_box(function: Callable[..., Tensor], box: Box) -> Box:
    """``function`` applied to each edge."""
    frames, rows, columns = ((function(first), function(last)) for first, last in box)
    return frames, rows, columns


def near_pairs(touches: Touch, query: Box, key: Box) -> tuple[Tensor, Tensor]:
    """Indices of the pairs of boxes that touch: two int64 ``[pairs]``, in no particular order.

    With few boxes, all pairs are tested. With many, boxes around groups of consecutive boxes are tested first, then the boxes
    inside the groups that touch. Consecutive blocks lie near each other, so the work is linear in the number of blocks.
    """
    if _count(query) * _count(key) <= _FEW_PAIRS:
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
        real = (q < _count(query)) & (kv < _count(key))
        found_q.append(q[real])
        found_kv.append(kv[real])
    return torch.cat(found_q), torch.cat(found_kv)


def _count(box: Box) -> int:
    return len(box[0][0])


def _in_groups(box: Box) -> Box:
    """Boxes cut into rows of ``_GROUP``, the last row filled with empty boxes: six ``[groups, _GROUP]``."""
    count = -(-_count(box) // _GROUP)

    def rows_of(edge: Tensor, empty: int) -> Tensor:
        padded = edge.new_full((count * _GROUP,), empty)
        padded[: len(edge)] = edge
        return padded.view(count, _GROUP)

    frames, rows, columns = ((rows_of(first, FAR), rows_of(last, -FAR)) for first, last in box)
    return frames, rows, columns


def _around(groups: Box) -> Box:
    """One box around each row of boxes."""
    frames, rows, columns = ((first.amin(1), last.amax(1)) for first, last in groups)
    return frames, rows, columns
