"""What a window will do at one resolution, in numbers, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexclear.compile.files import whole_file
from flexclear.images.sheet import side_by_side
from flexclear.masks import Cost, Disc, Layout, block_pairs, cost
from flexclear.masks.blocks import check_block_size, default_block_size
from flexclear.masks.checks import check_int
from flexclear.masks.pictures import block_picture, window_picture

PX_PER_TOKEN = 16
"""Pixels that one FLUX.1 or SD3 token covers: VAE factor 8, then 2 x 2 packing."""

BREAK_EVEN = 2.0
"""How many times less work it takes to win time. The published H100 times fit 590 TFLOP/s for dense attention and 300 of
executed work for FlexAttention; two CPU cores show the same ratio (``bench/attention/speed.py``)."""


@dataclass(frozen=True)
class Explanation:
    """Density, blocks and predicted work of one attention layer. ``print`` it.

    Attributes:
        layout: the sequence.
        window: the window.
        block_size: tokens per (query, key-value) block.
        cost: in the layout's own order.
        raster_cost: with tokens row by row in 128 x 128 blocks, as in the paper's code.
    """

    layout: Layout
    window: Disc
    block_size: tuple[int, int]
    cost: Cost
    raster_cost: Cost

    def __str__(self) -> str:
        layout, spent = self.layout, self.cost
        blocks = spent.full + spent.partial + spent.skipped
        gain = spent.predicted_speedup
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
            f"predicted work    {1 / gain:8.1%}  of dense attention's, {gain:.1f} times less "
            f"(raster order: {self.raster_cost.predicted_speedup:.1f} times)",
        ]
        if gain < BREAK_EVEN:
            lines.append(
                f"No gain in time to expect below {BREAK_EVEN:.0f} times less work, because FlexAttention runs at about half "
                "the rate of a fused dense kernel. Use a smaller radius or larger images, or keep the model dense."
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
    channels: int = 3072,
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

    def square(tokens: int) -> Cost:
        return cost(Layout(tokens, tokens, text_len), Disc(r), channels=channels)

    lines = [
        "| image, px | density | GFLOPs per layer | executed / useful | work of dense | attention, predicted |",
        "|---|---|---|---|---|---|",
    ]
    for side in sides:
        spent = square(side // px_per_token)
        lines.append(
            f"| {side} x {side} | {spent.density:.2%} | {spent.flops / 1e9:.1f} | {spent.amplification:.2f} | "
            f"{1 / spent.predicted_speedup:.1%} | {spent.predicted_speedup / BREAK_EVEN:.1f} x |"
        )
    low, high = 1, 1024
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if square(middle).predicted_speedup >= BREAK_EVEN else (middle + 1, high)
    lines.append("")
    lines.append(
        f"Below about {low * px_per_token} x {low * px_per_token} px dense attention is as fast or faster at r = {r} "
        f"({low} x {low} tokens): predicted gains count FlexAttention at 1 / {BREAK_EVEN:.0f} of the dense kernel's rate."
    )
    return "\n".join(lines)


def explain_window(
    height: int,
    width: int,
    r: int = 16,
    *,
    text_len: int = 512,
    text_first: bool = True,
    px_per_token: int = PX_PER_TOKEN,
    channels: int = 3072,
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
        block_size: tokens per block, or a (query, key-value) pair; the layout's default otherwise.

    Raises:
        TypeError, ValueError: an argument makes no sense; the message names it.
    """
    for name, value in (("height", height), ("width", width)):
        check_int(name, value, px_per_token, None, "in pixels")
    layout = Layout(height // px_per_token, width // px_per_token, text_len, text_first)
    window = Disc(r)
    pair = default_block_size(layout.seq_len) if block_size is None else check_block_size(block_size)
    return Explanation(
        layout=layout,
        window=window,
        block_size=pair,
        cost=cost(layout, window, channels=channels, block_size=pair),
        raster_cost=cost(layout.with_order("raster"), window, channels=channels, block_size=128),
    )
