"""What a window costs: exact counts of allowed pairs, FLOPs, and the work that block sparsity actually executes."""

from __future__ import annotations

from dataclasses import dataclass

from flexclear.masks.blocks import block_pairs
from flexclear.masks.defaults import independent
from flexclear.masks.layout import Layout
from flexclear.masks.scan import count_in_blocks
from flexclear.masks.windows import MaskMod, Window, as_window, is_plain


@dataclass(frozen=True)
class Cost:
    """Cost of one attention layer for one sample.

    Attributes:
        pairs: allowed (query, key) pairs, exact.
        dense_pairs: pairs of dense attention, ``seq_len ** 2``.
        executed_pairs: pairs inside the computed blocks, including padding at the end.
        full, partial, skipped: number of blocks of each kind.
        channels: heads times head dimension.
    """

    pairs: int
    dense_pairs: int
    executed_pairs: int
    full: int
    partial: int
    skipped: int
    channels: int

    @property
    def flops(self) -> int:
        """``4 * channels * pairs``: two products of two operations each (the count of the paper's Table 2)."""
        return 4 * self.channels * self.pairs

    @property
    def dense_flops(self) -> int:
        """The same for dense attention."""
        return 4 * self.channels * self.dense_pairs

    @property
    def density(self) -> float:
        """Fraction of all pairs that is allowed."""
        return self.pairs / self.dense_pairs

    @property
    def amplification(self) -> float:
        """Ratio of executed to useful work; 1 would be perfect."""
        return self.executed_pairs / self.pairs

    @property
    def predicted_speedup(self) -> float:
        """Ratio of dense to executed pairs: the speedup of attention alone if both kernels ran equally fast."""
        return self.dense_pairs / self.executed_pairs


@independent
def cost(
    layout: Layout,
    window: Window | MaskMod,
    *,
    channels: int = 3072,
    block_size: int | tuple[int, int] | None = None,
) -> Cost:
    """Exact cost of attention under ``window`` over ``layout``.

    >>> f"{cost(Layout(64, 64), Disc(16)).flops / 1e9:.1f} GFLOPs"     # the paper's Table 7 (its Table 2 has a misprint)
    '86.6 GFLOPs'

    Args:
        layout: the sequence.
        window: a window such as ``Disc(16)``, or any ``mask_mod`` over the layout's sequence positions (on CPU).
        channels: heads times head dimension (3072 for FLUX.1).
        block_size: tokens per block, or a ``(query, key-value)`` pair; ``default_block_size`` by default.

    Raises:
        TypeError: ``window`` is neither a window nor a ``mask_mod``.
        ValueError: ``block_size`` is invalid, or the window does not fit the grid.
    """
    blocks = block_pairs(layout, window, block_size)
    text, image = layout.text_len, layout.image_len
    counts = layout.is_full and not is_plain(window)
    image_pairs = as_window(window).image_pairs(layout) if counts else None
    if image_pairs is None:
        mask_mod = window if is_plain(window) else as_window(window).mask_mod(layout)
        key_len = layout.seq_len if is_plain(window) else as_window(window).key_len(layout)
        partial = ~blocks.full
        pairs = blocks.full_count * blocks.block_size[0] * blocks.block_size[1] + count_in_blocks(
            mask_mod, blocks.q[partial], blocks.kv[partial], layout.seq_len, key_len, blocks.block_size
        )
    else:
        pooled = as_window(window).key_len(layout) - layout.seq_len
        pairs = text * (text + image) + image * (text + pooled) + image_pairs
    return Cost(
        pairs=pairs,
        dense_pairs=layout.seq_len**2,
        executed_pairs=len(blocks.q) * blocks.block_size[0] * blocks.block_size[1],
        full=blocks.full_count,
        partial=blocks.partial_count,
        skipped=blocks.skipped_count,
        channels=channels,
    )
