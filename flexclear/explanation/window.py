"""What a window will do at one resolution, in numbers, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexclear.compile.files import whole_file
from flexclear.compile.tuned import choose_tuned
from flexclear.images.sheet import side_by_side
from flexclear.masks import Cost, Disc, Layout, block_pairs, cost
from flexclear.masks.blocks import check_block_size, default_block_size
from flexclear.masks.checks import check_int
from flexclear.masks.pictures import block_picture, window_picture
from flexclear.rates.kept import rates_for
from flexclear.rates.rates import LINEAR_PARAMETERS, PUBLISHED, Rates, Seconds

PX_PER_TOKEN = 16
"""Pixels that one FLUX.1 or SD3 token covers: VAE factor 8, then 2 x 2 packing."""

CHANNELS, HEAD_DIM = 3072, 128
"""Of FLUX.1."""


@dataclass(frozen=True)
class Explanation:
    """Density, blocks and predicted work of one attention layer. ``print`` it.

    Attributes:
        layout: the sequence.
        window: the window.
        block_size: tokens per (query, key-value) block.
        cost: in the layout's own order.
        raster_cost: with tokens row by row in 128 x 128 blocks, as in the paper's code.
        rates: that times are predicted by.
    """

    layout: Layout
    window: Disc
    block_size: tuple[int, int]
    cost: Cost
    raster_cost: Cost
    rates: Rates

    @property
    def layer(self) -> Seconds:
        """A layer of a step: attention, and the projections and MLP of a layer of this width, for text and image."""
        return layer_seconds(self.cost, self.rates)

    def __str__(self) -> str:
        layout, spent = self.layout, self.cost
        blocks = spent.full + spent.partial + spent.skipped
        layer, executed = self.layer, 1 / spent.predicted_speedup
        lines = [
            f"{layout.height} x {layout.width} image tokens and {layout.text_len} of text "
            f"({'text first' if layout.text_first else 'text last'}), window radius {self.window.radius}, "
            f"{layout.order} order, blocks {self.block_size[0]} x {self.block_size[1]}",
            f"density           {spent.density:8.2%}  of {spent.dense_pairs:.3g} pairs",
            f"arithmetic        {spent.flops / 1e9:8.1f}  GFLOPs per layer at {spent.channels} channels "
            f"(dense {spent.dense_flops / 1e9:.1f})",
            f"full blocks       {spent.full:8d}  {spent.full / blocks:.1%}",
            f"partial blocks    {spent.partial:8d}  {spent.partial / blocks:.1%}",
            f"skipped blocks    {spent.skipped:8d}  {spent.skipped / blocks:.1%}",
            f"executed / useful {spent.amplification:8.2f}  (raster order: {self.raster_cost.amplification:.2f})",
            f"executed work     {executed:8.1%}  of dense attention's "
            f"(raster order: {1 / self.raster_cost.predicted_speedup:.1%})",
            f"attention         {layer.dense / layer.attention:8.2f}  times as fast, predicted",
            f"step              {layer.gain:8.2f}  times as fast, predicted; of each layer {layer}",
            f"rates             {self.rates}",
        ]
        if layer.gain < 1:
            lines.append(
                "No gain in time to expect: FlexAttention runs at a lower rate than a fused dense kernel, and too little work is "
                "left out. Use a smaller radius or larger images, or keep the model dense."
            )
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Draw one query's window and the block map into a PNG file; returns its path."""
        path = Path(path)
        pairs = block_pairs(self.layout, self.window, self.block_size)
        window = window_picture(self.layout, self.window)
        titles = [
            f"what one query sees of {self.layout.height} x {self.layout.width} tokens: {self.window.name}",
            f"{pairs.q_blocks} x {pairs.kv_blocks} blocks: {pairs.full_count} full (dark), {pairs.partial_count} partial",
        ]
        with whole_file(path) as beside:
            side_by_side([window, block_picture(pairs)], titles).save(beside, format="PNG")
        return path


def resolution_table(
    r: int = 16,
    *,
    text_len: int = 512,
    px_per_token: int = PX_PER_TOKEN,
    channels: int = CHANNELS,
    sides: Sequence[int] = (512, 1024, 2048, 4096, 8192),
) -> str:
    """Density, work and predicted gain over square images as a Markdown table, and from what size on there is a gain.

    Args:
        r: window radius in tokens.
        text_len: text tokens.
        px_per_token: pixels per token and side.
        channels: heads times head dimension.
        sides: image sides in pixels.
    """

    rates = _rates()

    def square(tokens: int) -> Cost:
        layout = Layout(tokens, tokens, text_len)
        return cost(layout, Disc(r), channels=channels, block_size=_block_size(layout, r, rates))

    lines = [
        "| image, px | density | GFLOPs per layer | executed / useful | work of dense | attention, predicted | step, predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for side in sides:
        spent = square(side // px_per_token)
        layer = layer_seconds(spent, rates)
        lines.append(
            f"| {side} x {side} | {spent.density:.2%} | {spent.flops / 1e9:.1f} | {spent.amplification:.2f} | "
            f"{1 / spent.predicted_speedup:.1%} | {layer.dense / layer.attention:.2f} x | {layer.gain:.2f} x |"
        )
    low, high = 1, 1024
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if layer_seconds(square(middle), rates).gain >= 1 else (middle + 1, high)
    lines.append("")
    lines.append(
        f"Below about {low * px_per_token} x {low * px_per_token} px dense attention is as fast or faster at r = {r} "
        f"({low} x {low} tokens). Rates: {rates}."
    )
    return "\n".join(lines)


def layer_seconds(spent: Cost, rates: Rates) -> Seconds:
    """A layer of a transformer under a window, by ``rates``: 12 parameters per squared channel besides attention."""
    tokens = math.isqrt(spent.dense_pairs)
    linears = 2 * LINEAR_PARAMETERS * spent.channels**2 * tokens
    return Seconds(rates.windowed_s(spent), rates.dense_s(spent), rates.rest_s(linears, tokens * spent.channels))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _rates() -> Rates:
    return rates_for(_device(), torch.bfloat16, HEAD_DIM)


def _block_size(layout: Layout, r: int, rates: Rates) -> tuple[int, int]:
    """The blocks that attention without gradients has where the rates are of: here, or on a GPU."""
    if rates in PUBLISHED.values():
        return default_block_size(layout.seq_len)
    return choose_tuned(_device(), torch.bfloat16, HEAD_DIM, reach=r, seq_len=layout.seq_len).block_size


def explain_window(
    height: int,
    width: int,
    r: int = 16,
    *,
    text_len: int = 512,
    text_first: bool = True,
    px_per_token: int = PX_PER_TOKEN,
    channels: int = CHANNELS,
    block_size: int | tuple[int, int] | None = None,
) -> Explanation:
    """What CLEAR's window of radius ``r`` costs for an image of ``height`` x ``width`` pixels.

    >>> print(explain_window(1024, 1024, r=8))                            # doctest: +ELLIPSIS
    64 x 64 image tokens and 512 of text (text first), window radius 8, tiled order, blocks 128 x 64
    density             24.33%  of 2.12e+07 pairs
    ...

    Args:
        height, width: image size in pixels; a remainder below ``px_per_token`` is cut off, as pipelines do.
        r: window radius in tokens.
        text_len: text tokens: 512 for FLUX.1, 333 for SD3.
        text_first: whether text precedes the image.
        px_per_token: pixels per token and side; 1 if height and width are in tokens.
        channels: heads times head dimension: 3072 for FLUX.1.
        block_size: tokens per block, or a (query, key-value) pair; what attention in bfloat16 has here otherwise.

    Raises:
        TypeError, ValueError: an argument makes no sense; the message names it.
    """
    for name, value in (("height", height), ("width", width)):
        check_int(name, value, px_per_token, None, "in pixels")
    layout = Layout(height // px_per_token, width // px_per_token, text_len, text_first)
    window = Disc(r)
    rates = _rates()
    pair = _block_size(layout, r, rates) if block_size is None else check_block_size(block_size)
    return Explanation(
        layout=layout,
        window=window,
        block_size=pair,
        cost=cost(layout, window, channels=channels, block_size=pair),
        raster_cost=cost(layout.with_order("raster"), window, channels=channels, block_size=128),
        rates=rates,
    )
