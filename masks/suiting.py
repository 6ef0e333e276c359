"""The token order that suits a window over several frames.

Attention executes whole blocks of consecutive tokens, so the work depends on their shape, and the best shape depends on the
window: blocks through all frames if it sees the same place in every frame, flat blocks if it sees only a frame or two. A
single order for all windows would execute up to 1.8 times as much (``bench/results/clips.md``).
"""

from __future__ import annotations

import functools

import torch

from flexclear.masks.boxes import cut, map_box
from flexclear.masks.defaults import independent
from flexclear.masks.layout import Layout
from flexclear.masks.places import Box
from flexclear.masks.windows import Window

BLOCKS = (128, 64)
"""Tokens per (query, key-value) block when orders are compared."""

_FRAMES, _ROWS = (1, 2, 3, 4, 6), (2, 3, 4, 5, 6, 8)
_IN_COLUMN = range(8, 65)
"""Tokens in a column of a band: with fewer, blocks are long strips; with more, thin slices."""

_QUERIES = 256


@independent
def suited(layout: Layout, window: Window | None) -> Layout:
    """``layout`` with the bands of frames and rows, among those tried, under which ``window`` executes least.

    >>> from flexclear.masks import all_frames
    >>> suited(Layout(12, 20, text_len=0, frames=9), all_frames(3)).order
    (9, 2)

    An image is returned unchanged, and so is a layout whose order is ``"raster"`` or an explicit pair.

    Args:
        layout: the sequence.
        window: the window; None: dense attention, for which any order is equally good.

    Raises:
        ValueError: the window does not fit the layout.
    """
    if layout.frames == 1 or layout.order != "tiled" or window is None:
        return layout
    window.check(layout)
    return layout.with_order(_suited(layout, window))


@functools.lru_cache(maxsize=64)
def _suited(layout: Layout, window: Window) -> tuple[int, int]:
    tried = {
        (min(frames, layout.frames), min(rows, layout.height))
        for frames in (*_FRAMES, layout.frames)
        for rows in _ROWS
        if frames * rows in _IN_COLUMN or (frames == layout.frames and rows == _ROWS[0])
    }
    return min(sorted(tried), key=lambda bands: _executed(layout.with_order(bands), window))


def _executed(layout: Layout, window: Window) -> int:
    """Number of blocks executed by a sample of block rows; the sample is the same for every order of a layout."""
    tokens = layout.packed_coordinates()
    queries, keys = (cut(tokens, layout.packing, size) for size in BLOCKS)
    rows = torch.arange(len(queries))
    if len(rows) > _QUERIES:
        rows = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_QUERIES]
    query: Box = map_box(lambda edge: edge[rows, None], queries.box)
    key: Box = map_box(lambda edge: edge[None, :], keys.box)
    return int(window.touches(layout, query, key).sum())
