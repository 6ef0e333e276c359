"""Masks as images: uint8 RGB tensors ``[height, width, 3]``, which any image library takes."""

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
def window_picture(layout: Layout, window: Window, query: tuple[int, int] | None = None) -> Tensor:
    """What one image query sees on the grid, one pixel per token: red the query, blue its keys.

    Args:
        layout: the sequence.
        window: a window of this package.
        query: row and column of the query; the middle by default.

    Raises:
        ValueError: the query is not on the grid.
    """
    row, column = query or (layout.height // 2, layout.width // 2)
    if not (0 <= row < layout.height and 0 <= column < layout.width):
        raise ValueError(f"query must be (row, column) on the grid of {layout.height} x {layout.width}, got {query}")
    y = torch.arange(layout.height, dtype=torch.int32)[:, None]
    x = torch.arange(layout.width, dtype=torch.int32)[None, :]
    inside = window.rule(layout, int_number("cpu"))
    seen = inside(torch.tensor(row, dtype=torch.int32), torch.tensor(column, dtype=torch.int32), y, x)
    picture = _paint(seen.expand(layout.height, layout.width).to(torch.int64), [UNSEEN, SEEN])
    picture[row, column] = torch.tensor(QUERY, dtype=torch.uint8)
    return picture


@independent
def block_picture(pairs: BlockPairs, most: int = 512) -> Tensor:
    """The block map, queries downwards and keys to the right, one pixel per block: dark full, light partial, white skipped.

    Where there are more than ``most`` blocks along an axis, only the first ``most`` are shown.
    """
    rows, columns = min(pairs.q_blocks, most), min(pairs.kv_blocks, most)
    kinds = torch.zeros(rows, columns, dtype=torch.int64)
    shown = (pairs.q < rows) & (pairs.kv < columns)
    kinds[pairs.q[shown], pairs.kv[shown]] = torch.where(pairs.full[shown], 2, 1)
    return _paint(kinds, [SKIPPED, PARTIAL, FULL])


def _paint(kinds: Tensor, colours: list[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[kinds]
