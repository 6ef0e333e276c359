"""The block-sparse mask, built from bounding boxes in time linear in the number of blocks, never from N x N pairs.

The image tokens of a block have a bounding box. The least and the greatest possible distance between two boxes decide:
if no pair can be allowed, the block is skipped; if every pair must be, it is full; otherwise it is partial, and the
``mask_mod`` decides inside the kernel. This is exact where blocks are rectangles (aligned tiles) and safe everywhere: a
box can only be too large, which turns a skipped or a full block into a partial one, never the reverse.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexclear.masks.boxes import cut, near_pairs
from flexclear.masks.coordinates import Source
from flexclear.masks.cpu import PACKED_TYPES
from flexclear.masks.defaults import independent
from flexclear.masks.layout import Layout
from flexclear.masks.scan import scan_blocks
from flexclear.masks.windows import MaskMod, Window, as_window, is_plain

SMALL_BLOCKS_BELOW = 1 << 17
"""Sequence length below which blocks may be small on CPU."""

MANY_TOKENS = 1 << 19
"""Sequence length from which the block lists are the first thing to run out of memory."""

_FORWARD_LISTS_SUFFICE = "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters
"""Whether this torch accepts a BlockMask without lists by key-value block; torch 2.8 requires them."""


def default_block_size(
    seq_len: int,
    backward: bool = False,
    device: torch.device | str = "cuda",
    reach: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[int, int]:
    """Tokens per (query, key-value) block unless something else is requested. ``flexclear.compile.kernels`` has a table for GPUs
    that takes precedence.

    On CPU, (32, 32): without packed products the kernel is as fast on small blocks, and these execute less work. On two cores
    of an AMD EPYC it takes 0.82 to 0.95 of the time of (64, 64) at r = 8 and 16. From 2^17 tokens on, (64, 64), to keep the
    lists small. With AMX, which prefers long products, (64, 64), and (128, 128) from a reach of 12 on: on an Intel machine
    (128, 128) took 0.87 of the time of (128, 64) at r = 16, and (64, 64) took 0.88 at r = 8.

    Elsewhere, (128, 64): an 8 x 16 tile of queries against 8 x 8 halves. The ratio of executed to useful work (``cost``) at
    1024 to 8192 px and r = 8 to 32 is 1.29 to 1.60, against 1.31 to 1.76 with (128, 128) and 1.22 to 1.43 with (64, 64). From
    2^19 tokens on (above 11,500 px), (128, 128): as text rows name every block, the lists have as many entries as there are
    block pairs, and at 16,384 px they would exceed 1 GB; at r = 16 the executed work is the same. (128, 128) also for a
    backward pass: FlexAttention's backward kernels on GPUs process up to 128 keys at a time, and refuse blocks that this
    number does not divide.

    Args:
        seq_len: tokens of the sequence.
        backward: whether a backward pass follows.
        device: where attention runs.
        reach: ``Window.reach``.
        dtype: of query, key and value.
    """
    if torch.device(device).type == "cpu":
        if dtype in PACKED_TYPES:
            return (128, 128) if reach is None or reach >= 12 else (64, 64)
        return (32, 32) if seq_len < SMALL_BLOCKS_BELOW else (64, 64)
    return (128, 64) if seq_len < MANY_TOKENS and not backward else (128, 128)


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


@independent
def block_pairs(
    layout: Layout,
    window: Window | MaskMod,
    block_size: int | tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    text_padded: bool = False,
) -> BlockPairs:
    """Classify all block pairs of ``layout`` under ``window``: the needed ones, each full or partial.

    A window of this package is classified from bounding boxes. A custom ``mask_mod`` is evaluated on every pair in
    bounded memory, which is exact but takes time quadratic in the sequence length.

    ``text_padded``: some text may be padding (``with_text_mask``), so no block of text keys counts as full.

    Raises:
        TypeError: ``window`` is neither a window nor a ``mask_mod``.
        ValueError: ``block_size`` is invalid, or the window does not fit the grid.
    """
    q_size, kv_size = default_block_size(layout.seq_len) if block_size is None else check_block_size(block_size)
    if is_plain(window):
        found, whole = scan_blocks(window, layout.seq_len, layout.seq_len, (q_size, kv_size), device)
        q, kv = torch.nonzero(found, as_tuple=True)
        if text_padded:
            whole = whole & ~cut(layout.packed_coordinates(), layout.packing, kv_size).text
        return BlockPairs(q, kv, whole[q, kv], found.shape[0], found.shape[1], (q_size, kv_size))
    window = as_window(window)
    tokens = layout.packed_coordinates(), window.key_coordinates(layout)
    return pairs_between(layout, window, *tokens, (q_size, kv_size), text_padded)


def pairs_between(
    layout: Layout,
    window: Window,
    query_tokens: Tensor,
    key_tokens: Tensor,
    block_size: tuple[int, int],
    text_padded: bool = False,
) -> BlockPairs:
    """``block_pairs`` for any queries and keys, given by their packed coordinates, int32 ``[tokens]`` each."""
    q_size, kv_size = block_size
    window.check(layout)
    queries, keys = (
        cut(tokens, layout.packing, size) for tokens, size in ((query_tokens, q_size), (key_tokens, kv_size))
    )
    near_q, near_kv = near_pairs(partial(window.touches, layout), queries.box, keys.box)
    every_q, every_kv = torch.arange(len(queries)), torch.arange(len(keys))
    candidates = torch.cat(
        [
            near_q * len(keys) + near_kv,
            (every_q[queries.text, None] * len(keys) + every_kv).view(-1),
            (every_q[:, None] * len(keys) + every_kv[keys.text | keys.pooled]).view(-1),
        ]
    ).unique()
    q, kv = candidates // len(keys), candidates % len(keys)
    boxes = queries.boxes(q), keys.boxes(kv)
    both_image = queries.image[q] & keys.image[kv]
    needed = (
        (both_image & window.touches(layout, *boxes))
        | (queries.text[q] & (keys.text[kv] | keys.image[kv]))
        | (queries.image[q] & (keys.text[kv] | keys.pooled[kv]))
    )
    full = (
        (~both_image | window.covers(layout, *boxes))
        & ~(queries.text[q] & keys.pooled[kv])
        & (queries.whole[q] & keys.whole[kv])
        & ~(keys.text[kv] & text_padded)
    )
    return BlockPairs(q[needed], kv[needed], full[needed], len(queries), len(keys), (q_size, kv_size))


def _lists(rows: Tensor, columns: Tensor, row_count: int, width: int) -> tuple[Tensor, Tensor]:
    """Counts ``[1, 1, row_count]`` and indices ``[1, 1, row_count, width]``, int32, from pairs sorted by row."""
    counts = torch.bincount(rows, minlength=row_count)
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    indices = torch.zeros(row_count, width, dtype=torch.int32)
    indices[rows, place] = columns.to(torch.int32)
    return counts.to(torch.int32)[None, None], indices[None, None]


@independent
def block_mask(
    layout: Layout,
    window: Window | MaskMod,
    *,
    block_size: int | tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    backward: bool = False,
    text_padded: bool = False,
    coordinates: Source | None = None,
    narrow: bool = False,
) -> BlockMask:
    """The window over the layout as FlexAttention's ``BlockMask``, broadcast over batch and heads.

    >>> mask = block_mask(Layout(64, 64), Disc(16))          # milliseconds; create_block_mask would evaluate all N^2 pairs
    >>> mask.shape
    (1, 1, 4608, 4608)

    Args:
        layout: the sequence.
        window: a window such as ``Disc(16)``, or any ``mask_mod`` over the layout's sequence positions.
        block_size: tokens per block, or a ``(query, key-value)`` pair; multiples of 16 from 16 to 256.
            ``default_block_size`` by default.
        device: where the lists and the captured tables are placed, and where a custom ``mask_mod`` has its tensors.
        backward: also build the lists by key-value block, which the backward kernels use.
        text_padded: prepare for ``with_text_mask``: every block of text keys evaluates the ``mask_mod``.
        coordinates: where the ``mask_mod`` gets coordinates from, see ``flexclear.masks.coordinates.Source``; None: the best
            source for the device.
        narrow: make the lists only as wide as the longest one, which saves memory if no row names every block. Only for CUDA
            kernels: the CPU kernel and BlockMask's own methods take the width for the number of blocks.

    Raises:
        TypeError: ``window`` is neither a window nor a ``mask_mod``.
        ValueError: ``block_size`` is invalid, or the window does not fit the grid.
    """
    if block_size is None:
        reach = None if is_plain(window) else as_window(window).reach
        block_size = default_block_size(layout.seq_len, backward, device, reach)
    pairs = block_pairs(layout, window, block_size, device, text_padded)
    if is_plain(window):
        mask_mod, key_len = window, layout.seq_len
    else:
        found = as_window(window)
        mask_mod, key_len = found.mask_mod(layout, device, coordinates), found.key_len(layout)
    return assembled(pairs, mask_mod, (layout.seq_len, key_len), device, backward, narrow)


@independent
def block_mask_between(
    layout: Layout,
    window: Window,
    queries: int,
    key_tokens: Tensor,
    *,
    block_size: tuple[int, int],
    device: torch.device | str = "cpu",
    text_padded: bool = False,
    coordinates: Source | None = None,
) -> BlockMask:
    """The window over some of the layout's tokens. The queries are the tokens of the first ``queries`` keys.

    Args:
        layout: the whole sequence, to which the window's rule is bound.
        window: a window of this package.
        queries: number of queries.
        key_tokens: packed coordinates of the keys, int32 ``[keys]``.
        block_size, device, text_padded, coordinates: see ``block_mask``.
    """
    pairs = pairs_between(layout, window, key_tokens[:queries], key_tokens, block_size, text_padded)
    mask_mod = window.mask_mod_over(layout, key_tokens, device, coordinates)
    return assembled(pairs, mask_mod, (queries, len(key_tokens)), device, backward=False)


def assembled(
    pairs: BlockPairs,
    mask_mod: MaskMod,
    lengths: tuple[int, int],
    device: torch.device | str,
    backward: bool,
    narrow: bool = False,
) -> BlockMask:
    """A BlockMask made from block pairs over ``lengths`` (queries, keys).

    ``narrow``: see ``block_mask``.
    """
    full, part = pairs.full, ~pairs.full
    width = pairs.kv_blocks
    if narrow:
        longest = max(int(torch.bincount(pairs.q[some], minlength=1).max()) for some in (part, full))
        width = min(-(-longest // 8) * 8, width)
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    by_query = (
        *_lists(pairs.q[part], pairs.kv[part], pairs.q_blocks, width),
        *_lists(pairs.q[full], pairs.kv[full], pairs.q_blocks, width),
    )
    lists: dict[str, Any] = {name: t.to(device) for name, t in zip(names, by_query, strict=True)}
    names = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
    lists.update(dict.fromkeys(names))
    if backward or not _FORWARD_LISTS_SUFFICE:
        turned = torch.argsort(pairs.kv, stable=True)
        q, kv, is_full = pairs.q[turned], pairs.kv[turned], full[turned]
        by_key = (
            *_lists(kv[~is_full], q[~is_full], pairs.kv_blocks, pairs.q_blocks),
            *_lists(kv[is_full], q[is_full], pairs.kv_blocks, pairs.q_blocks),
        )
        lists.update({name: t.to(device) for name, t in zip(names, by_key, strict=True)})
    return BlockMask(
        seq_lengths=lengths,
        BLOCK_SIZE=pairs.block_size,
        mask_mod=mask_mod,
        **lists,
    )
