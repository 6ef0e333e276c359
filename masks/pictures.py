"""Masks as images: uint8 RGB tensors ``[height, width, 3]``, which any image library accepts."""

from __future__ import annotations

import torch
from torch import Tensor

from flexclear.masks.blocks import BlockPairs
from flexclear.masks.coordinates import int_number
from flexclear.masks.defaults import independent
from flexclear.masks.layout import Layout
from flexclear.masks.windows import Window

QUERY, SEEN, UNSEEN = (214, 39, 40), (70, 130, 200), (232, 232, 232)
FULL, PARTIAL, SKIPPED = (31, 58, 104), (134, 178, 226), (246, 246, 246)


@independent
def window_picture(layout: Layout, window: Window, query: tuple[int, ...] | None = None) -> Tensor:
    """What one image query sees on the grid, one pixel per token: the query in red, its keys in blue. Several frames lie side
    by side, separated by white lines.

    Args:
        layout: the sequence.
        window: a window of this package.
        query: row and column of the query, or (frame, row, column) for several frames; the middle by default.

    Raises:
        ValueError: the query is not on the grid, or the window does not fit it.
    """
    window.check(layout)
    shape = layout.shape if layout.frames > 1 else layout.shape[1:]
    place = tuple(side // 2 for side in shape) if query is None else query
    if len(place) != len(shape) or any(not 0 <= at < side for at, side in zip(place, shape, strict=True)):
        names = "(frame, row, column)" if layout.frames > 1 else "(row, column)"
        raise ValueError(f"query must be {names} on the grid of {' x '.join(map(str, shape))}, got {query}")
    frame, row, column = (0, 0, *place)[-3:]
    axes = [torch.arange(side, dtype=torch.int32) for side in layout.shape]
    own = torch.tensor([frame, row, column], dtype=torch.int32).unbind()
    inside = window.rule(layout, int_number("cpu"))
    seen = inside((own[0], own[1], own[2]), (axes[0][:, None, None], axes[1][:, None], axes[2]))
    frames = _paint(seen.expand(layout.shape).to(torch.int64), [UNSEEN, SEEN])
    frames[frame, row, column] = torch.tensor(QUERY, dtype=torch.uint8)
    strip = torch.full((layout.height, layout.frames * (layout.width + 1), 3), 255, dtype=torch.uint8)
    for number, one in enumerate(frames):
        start = number * (layout.width + 1)
        strip[:, start : start + layout.width] = one
    return strip[:, :-1]


@independent
def block_picture(pairs: BlockPairs, most: int = 512) -> Tensor:
    """The block map, queries downwards and keys to the right, one pixel per block: full dark, partial light, skipped white.

    Only the first ``most`` blocks along an axis are shown.
    """
    rows, columns = min(pairs.q_blocks, most), min(pairs.kv_blocks, most)
    kinds = torch.zeros(rows, columns, dtype=torch.int64)
    shown = (pairs.q < rows) & (pairs.kv < columns)
    kinds[pairs.q[shown], pairs.kv[shown]] = torch.where(pairs.full[shown], 2, 1)
    return _paint(kinds, [SKIPPED, PARTIAL, FULL])


def _paint(kinds: Tensor, colours: list[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[kinds]
