"""Text queries apart from image queries: two exact attention calls over the same keys, whose rows need no merging.

Text sees every token, so a text row is as long as the sequence, while an image row is only as long as its window. In a single
kernel the few long rows keep a GPU waiting, and the block lists are as wide as the longest row. Run apart, text uses dense
attention with the fastest available kernel, and the image's lists grow only with the image.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexclear.masks.blocks import assembled, check_block_size, pairs_between
from flexclear.masks.carried import LENGTHS
from flexclear.masks.coordinates import Source
from flexclear.masks.defaults import independent
from flexclear.masks.layout import Layout
from flexclear.masks.lengths import mark_symbolic, of_any_text_length
from flexclear.masks.places import PADDING, TEXT
from flexclear.masks.windows import MaskMod, Window


@dataclass(frozen=True, eq=False)
class TextApart:
    """A window's mask in two parts.

    Attributes:
        image: the mask of the image queries over all keys. If text comes first, query blocks still begin where they do in the
            whole sequence, so the first block may begin with text queries; the contents of these rows are meaningless. If
            text comes last, the queries end with the image.
        text: an empty tensor ``[text_len, 0]``, whose size a compiler can treat as a symbol.
        layout, window: the layout and window that both parts belong to.
    """

    image: BlockMask
    text: Tensor
    layout: Layout
    window: Window

    @property
    def rows(self) -> int:
        """Number of queries of ``image``; a symbol if the compiler treats it as one."""
        lengths: Tensor = getattr(self.image, LENGTHS)
        return lengths.shape[0]

    @functools.cached_property
    def mask_mod(self) -> MaskMod:
        """The ``mask_mod`` of the whole sequence, including its text queries."""
        return self.window.mask_mod(self.layout, self.image.kv_indices.device)


def can_part(layout: Layout, window: Window | MaskMod) -> bool:
    """Whether there are text queries, and they see every key under ``window``."""
    return layout.text_len > 0 and isinstance(window, Window) and not window.pools


@independent
def text_apart(
    layout: Layout,
    window: Window,
    *,
    block_size: int | tuple[int, int],
    device: torch.device | str = "cpu",
    coordinates: Source | None = None,
    narrow: bool | None = None,
) -> TextApart:
    """The window over the layout, with text queries apart. For inference only: it has no lists by key-value block.

    Args:
        layout: the sequence, with at least one text token.
        window: a window without pooled keys.
        block_size: tokens per block, or a ``(query, key-value)`` pair.
        device: where the lists and the tensors that the ``mask_mod`` captures are placed.
        coordinates: see ``flexclear.masks.block_mask``.
        narrow: see ``flexclear.masks.block_mask``; None: narrow on every device but the CPU.

    Raises:
        ValueError: there is no text, the window has pooled keys or does not fit the grid, or ``block_size`` is invalid.
    """
    if not can_part(layout, window):
        raise ValueError(f"text cannot be attended apart under {window!r} over {layout.text_len} text tokens")
    q_size, kv_size = check_block_size(block_size)
    first = layout.text_len // q_size * q_size if layout.text_first else 0
    stop = layout.seq_len if layout.text_first else layout.image_len
    keys = window.key_coordinates(layout)
    queries = keys[first:stop]
    pairs = pairs_between(layout, window, queries.masked_fill(queries == TEXT, PADDING), keys, (q_size, kv_size))
    mask_mod = window.mask_mod(layout, device, coordinates, queries_from=first)
    is_narrow = torch.device(device).type != "cpu" if narrow is None else narrow
    image = assembled(pairs, mask_mod, (stop - first, len(keys)), device, backward=False, narrow=is_narrow)
    of_any_text_length(image)
    text = torch.empty(layout.text_len, 0, device=device)
    mark_symbolic(text, [0])
    return TextApart(image, text, layout, window)
