"""Attention FLOPs of every row of the paper's comparison."""

from __future__ import annotations

from flexclear.alternatives.names import named
from flexclear.masks import Layout, Window, cost
from flexclear.runtime.mechanism import Mechanism


def flops(
    attention: str | Mechanism | Window | None,
    layout: Layout,
    channels: int = 3072,
    heads: int = 24,
    layer: int = 0,
) -> int:
    """FLOPs of one attention layer for one sample: matrix products and what a mechanism adds to them, but not softmax.

    >>> f"{flops('pixart', Layout(64, 64)) / 1e9:.1f} GFLOPs"
    '67.7 GFLOPs'

    Args:
        attention: a name, a mechanism of ``flexclear.alternatives``, a window such as ``Disc(16)``, or None: dense.
        layout: the sequence; the published setting is ``Layout(64, 64)``, with 512 text tokens.
        channels: heads times head dimension.
        heads: number of heads. It matters only for linear attention, whose state is head_dim x head_dim in each head. The
            published 174.0 GFLOPs count a single head of 3072 channels; with FLUX.1's 24 it takes 7.3.
        layer: number of the layer. Swin's shifted windows are cut off at the border and have fewer pairs.

    Raises:
        TypeError, ValueError: no such mechanism, or ``"clear"``, which needs a window for its size.
    """
    if attention is None:
        return 4 * channels * layout.seq_len**2
    if isinstance(attention, Window):
        return cost(layout, attention, channels=channels).flops
    mechanism = named(attention)
    if mechanism is None:
        raise ValueError("the FLOPs of 'clear' depend on its window; pass flexclear.masks.Disc(r) instead")
    return mechanism.flops(layout, channels, heads, layer)
