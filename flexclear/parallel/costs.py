"""What ranks send, computed from the plan alone: formulas for comparison with measured bytes."""

from __future__ import annotations

from flexclear.masks import Layout, Window
from flexclear.parallel.masks import part_of_size
from flexclear.parallel.planning import Bands, borders, cut, tokens_in


def border_bytes(
    layout: Layout, window: Window | None, bands: Bands, rank: int, width: int, itemsize: int = 2, batch: int = 1
) -> int:
    """Bytes of keys and values that a rank sends in one layer.

    Args:
        layout, window, bands: the sequence, the layer's window, and where the image is cut.
        rank: the sending rank.
        width: channels of the keys, all heads.
        itemsize: bytes per number.
        batch: number of samples.
    """
    sent = [runs for (source, _), runs in borders(layout, window, bands).items() if source == rank]
    tokens = sum(len(tokens_in(layout, bands.axis, runs)) for runs in sent)
    return tokens * 2 * width * itemsize * batch


def text_bytes(text_len: int, heads: int, head_dim: int, text: str = "exact", batch: int = 1) -> int:
    """Bytes that a rank contributes to one layer's sums over text queries, float32: numerators, denominators and greatest
    log-sum-exps; or only the average."""
    numbers = heads * head_dim if text == "average" else heads * (head_dim + 2)
    return text_len * numbers * 4 * batch


def output_bytes(layout: Layout, bands: Bands, channels: int, itemsize: int = 2, batch: int = 1) -> int:
    """Bytes that a rank contributes to the gather at the model's exit: those of the largest band."""
    most = max(part_of_size(layout, bands, rank) for rank in range(bands.ranks))
    return most * channels * itemsize * batch if bands.ranks > 1 else 0


__all__ = ["border_bytes", "cut", "output_bytes", "text_bytes"]
