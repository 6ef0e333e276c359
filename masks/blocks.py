"""The block-sparse mask, built from bounding boxes in time linear in the number of blocks, never from N x N pairs.

The image tokens of a block have a bounding box. For two boxes the least and the greatest possible distance decide:
no pair can be allowed -> skip; every pair must be -> full block; else partial, and the ``mask_mod`` decides inside the
kernel. This is exact where blocks are rectangles (aligned tiles) and safe everywhere: a box can only be too large,
which turns a skipped block into a partial one or a full one into a partial one, never the reverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexclear.masks.layout import Layout
from flexclear.masks.windows import MaskMod, Window, as_window

DEFAULT_BLOCK_SIZE = (128, 64)
"""Query and key-value block: an 8 x 16 tile against 8 x 8 halves executes the least where 128 queries are a kernel row."""

_GROUP = 32
_FEW_PAIRS = 1 << 20


def check_block_size(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """``block_size`` as ``(query, key-value)``.

    Raises:
        ValueError: not one or two multiples of 16 from 16 to 256.
    """
    pair = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(pair) != 2 or any(not isinstance(b, int) or b % 16 or not 16 <= b <= 256 for b in pair):
        raise ValueError(
            f"block_size must be a multiple of 16 from 16 to 256, or a (query, key-value) pair of them, got {block_size!r}"
        )
    return pair[0], pair[1]


@dataclass(frozen=True)
class _Blocks:
    """One axis cut into blocks. Boxes cover a block's image tokens; a block without any has ``top > bottom``."""

    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor
    has_text: Tensor
    all_text: Tensor
    whole: Tensor

    def __len__(self) -> int:
        return len(self.top)

    def box(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.top[index], self.bottom[index], self.left[index], self.right[index]


def _cut(layout: Layout, size: int) -> _Blocks:
    packed = layout.packed_coordinates()
    count = -(-len(packed) // size)
    padded = torch.full((count * size,), -2, dtype=torch.int32)
    padded[: len(packed)] = packed
    tokens = padded.view(count, size)
    is_image, is_text, far = tokens >= 0, tokens == -1, 1 << 20
    y, x = tokens >> 16, tokens & 0xFFFF
    return _Blocks(
        top=y.masked_fill(~is_image, far).amin(1),
        bottom=y.masked_fill(~is_image, -far).amax(1),
        left=x.masked_fill(~is_image, far).amin(1),
        right=x.masked_fill(~is_image, -far).amax(1),
        has_text=is_text.any(1),
        all_text=is_text.all(1),
        whole=(tokens > -2).all(1),
    )


def _gap(low_a: Tensor, high_a: Tensor, low_b: Tensor, high_b: Tensor) -> Tensor:
    """Least distance along one axis between two intervals, 0 where they overlap."""
    return torch.maximum(low_a - high_b, low_b - high_a).clamp_min_(0)


def _span(low_a: Tensor, high_a: Tensor, low_b: Tensor, high_b: Tensor) -> Tensor:
    """Greatest distance along one axis between two intervals."""
    return torch.maximum(high_a - low_b, high_b - low_a)


def _touching(window: Window, q_box: tuple[Tensor, ...], kv_box: tuple[Tensor, ...]) -> Tensor:
    """Whether any pair of points of the two boxes could be allowed; empty boxes are far from everything."""
    dy = _gap(q_box[0], q_box[1], kv_box[0], kv_box[1])
    dx = _gap(q_box[2], q_box[3], kv_box[2], kv_box[3])
    near = (dy <= window.reach()) & (dx <= window.reach())
    return near & window.allows(dy.clamp_max(1 << 14), dx.clamp_max(1 << 14))


def _grouped(box: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Boxes around every ``_GROUP`` consecutive boxes."""
    count = -(-len(box[0]) // _GROUP)

    def reduce(edge: Tensor, empty: int) -> Tensor:
        padded = edge.new_full((count * _GROUP,), empty)
        padded[: len(edge)] = edge
        grouped = padded.view(count, _GROUP)
        return grouped.amin(1) if empty > 0 else grouped.amax(1)

    far = 1 << 20
    return reduce(box[0], far), reduce(box[1], -far), reduce(box[2], far), reduce(box[3], -far)


def _near_pairs(window: Window, q_box: tuple[Tensor, ...], kv_box: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Indices of the pairs of boxes that touch. Few boxes: all pairs; many: groups first, then inside near groups."""
    if len(q_box[0]) * len(kv_box[0]) <= _FEW_PAIRS:
        q_part, kv_part = (tuple(edge[:, None] for edge in q_box), tuple(edge[None, :] for edge in kv_box))
        q, kv = torch.nonzero(_touching(window, q_part, kv_part), as_tuple=True)
        return q, kv
    q_group, kv_group = _near_pairs(window, _grouped(q_box), _grouped(kv_box))
    found_q, found_kv = [], []
    inside = torch.arange(_GROUP)
    for start in range(0, len(q_group), 1 + _FEW_PAIRS // _GROUP**2):
        some = slice(start, start + 1 + _FEW_PAIRS // _GROUP**2)
        q = (q_group[some, None, None] * _GROUP + inside[:, None]).expand(-1, -1, _GROUP).reshape(-1)
        kv = (kv_group[some, None, None] * _GROUP + inside[None, :]).expand(-1, _GROUP, -1).reshape(-1)
        real = (q < len(q_box[0])) & (kv < len(kv_box[0]))
        q, kv = q[real], kv[real]
        keep = _touching(window, tuple(edge[q] for edge in q_box), tuple(edge[kv] for edge in kv_box))
        found_q.append(q[keep])
        found_kv.append(kv[keep])
    return torch.cat(found_q), torch.cat(found_kv)


@dataclass(frozen=True)
class BlockPairs:
    """The blocks that attention computes: parallel int64 ``[pairs]``, sorted by query block, then key-value block.

    Attributes:
        q: query block of each pair.
        kv: key-value block of each pair.
        full: whether every token pair of the block pair is allowed, bool ``[pairs]``.
        q_blocks, kv_blocks: number of blocks along each axis.
        block_size: tokens per ``(query, key-value)`` block.
    """

    q: Tensor
    kv: Tensor
    full: Tensor
    q_blocks: int
    kv_blocks: int
    block_size: tuple[int, int]

    @property
    def full_count(self) -> int:
        return int(self.full.sum())

    @property
    def partial_count(self) -> int:
        return len(self.q) - self.full_count

    @property
    def skipped_count(self) -> int:
        return self.q_blocks * self.kv_blocks - len(self.q)


def block_pairs(
    layout: Layout, window: Window | MaskMod, block_size: int | tuple[int, int] = DEFAULT_BLOCK_SIZE
) -> BlockPairs:
    """Classify all block pairs of ``layout`` under ``window``: the needed ones, each full or partial.

    Raises:
        TypeError: ``window`` is no window of this package.
        ValueError: ``block_size`` makes no sense.
    """
    window = as_window(window)
    q_size, kv_size = check_block_size(block_size)
    queries, keys = _cut(layout, q_size), _cut(layout, kv_size)
    every_q, every_kv = torch.arange(len(queries)), torch.arange(len(keys))
    near = _near_pairs(window, queries.box(every_q), keys.box(every_kv))
    text_rows = torch.cartesian_prod(every_q[queries.has_text], every_kv).view(-1, 2)
    text_columns = torch.cartesian_prod(every_q, every_kv[keys.has_text]).view(-1, 2)
    code = torch.cat(
        [
            near[0] * len(keys) + near[1],
            text_rows[:, 0] * len(keys) + text_rows[:, 1],
            text_columns[:, 0] * len(keys) + text_columns[:, 1],
        ]
    ).unique()
    q, kv = code // len(keys), code % len(keys)
    q_box, kv_box = queries.box(q), keys.box(kv)
    dy = _span(q_box[0], q_box[1], kv_box[0], kv_box[1]).clamp_(-1, 1 << 14)
    dx = _span(q_box[2], q_box[3], kv_box[2], kv_box[3]).clamp_(-1, 1 << 14)
    image_full = window.allows(dy, dx) & ~queries.all_text[q] & ~keys.all_text[kv]
    full = (image_full | queries.all_text[q] | keys.all_text[kv]) & queries.whole[q] & keys.whole[kv]
    return BlockPairs(q, kv, full, len(queries), len(keys), (q_size, kv_size))


def _lists(rows: Tensor, columns: Tensor, row_count: int, width: int) -> tuple[Tensor, Tensor]:
    """Counts ``[1, 1, row_count]`` and indices ``[1, 1, row_count, width]``, int32, from pairs sorted by row."""
    counts = torch.bincount(rows, minlength=row_count)
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    indices = torch.zeros(row_count, width, dtype=torch.int32)
    indices[rows, place] = columns.to(torch.int32)
    return counts.to(torch.int32)[None, None], indices[None, None]


def block_mask(
    layout: Layout,
    window: Window | MaskMod,
    *,
    block_size: int | tuple[int, int] = DEFAULT_BLOCK_SIZE,
    device: torch.device | str = "cpu",
    backward: bool = False,
) -> BlockMask:
    """The window over the layout as FlexAttention's ``BlockMask``, batch and head broadcast.

    >>> mask = block_mask(Layout(64, 64), Disc(16))          # milliseconds; create_block_mask would ask all N^2 pairs
    >>> mask.shape
    (1, 1, 4608, 4608)

    Args:
        layout: the sequence.
        window: a window such as ``Disc(16)``, or the ``mask_mod`` of ``disc(layout, r)``.
        block_size: tokens per block, or a ``(query, key-value)`` pair; multiples of 16 from 16 to 256.
        device: where the lists and the captured tables are put.
        backward: also build the lists by key-value block, which the backward kernels walk.

    Raises:
        TypeError: ``window`` is no window of this package.
        ValueError: ``block_size`` makes no sense.
    """
    window = as_window(window)
    pairs = block_pairs(layout, window, block_size)
    full, partial = pairs.full, ~pairs.full
    # The CPU kernel needs lists as wide as there are blocks, CUDA's does not; text rows need all of it on both.
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    by_query = (
        *_lists(pairs.q[partial], pairs.kv[partial], pairs.q_blocks, pairs.kv_blocks),
        *_lists(pairs.q[full], pairs.kv[full], pairs.q_blocks, pairs.kv_blocks),
    )
    lists: dict[str, Any] = {name: t.to(device) for name, t in zip(names, by_query, strict=True)}
    names = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
    lists.update(dict.fromkeys(names))
    if backward:
        turned = torch.argsort(pairs.kv, stable=True)
        q, kv, is_full = pairs.q[turned], pairs.kv[turned], full[turned]
        by_key = (
            *_lists(kv[~is_full], q[~is_full], pairs.kv_blocks, pairs.q_blocks),
            *_lists(kv[is_full], q[is_full], pairs.kv_blocks, pairs.q_blocks),
        )
        lists.update({name: t.to(device) for name, t in zip(names, by_key, strict=True)})
    return BlockMask(
        seq_lengths=(layout.seq_len, layout.seq_len),
        BLOCK_SIZE=pairs.block_size,
        mask_mod=window.mask_mod(layout, device),
        **lists,
    )
