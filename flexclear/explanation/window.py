"""What a window does at one resolution, in numbers, without running anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexclear.common.choices import ALL_FRAMES
from flexclear.compile.files import whole_file
from flexclear.compile.tuned import choose_tuned
from flexclear.images.sheet import side_by_side
from flexclear.masks import Cost, Disc, Layout, Window, all_frames, block_pairs, cost, cylinder, suited
from flexclear.masks.blocks import check_block_size, default_block_size
from flexclear.masks.checks import check_int
from flexclear.masks.pictures import block_picture, window_picture
from flexclear.rates.kept import rates_for
from flexclear.rates.rates import LINEAR_PARAMETERS, PUBLISHED, Rates, Seconds

PX_PER_TOKEN = 16
"""Pixels that one FLUX.1 or SD3 token covers: VAE factor 8, then 2 x 2 packing."""

CHANNELS, HEAD_DIM = 3072, 128
"""Of FLUX.1."""

TEXT_LEN = 512
"""Text tokens of FLUX.1. Videos have none, as in Wan, where text reaches a video by cross-attention."""

FRAMES_PER_TOKEN = 4
"""Number of frames that the VAE of Wan, HunyuanVideo and CogVideoX merges into one, after the first."""


@dataclass(frozen=True)
class Explanation:
    """Density, blocks and predicted work of one attention layer. ``print`` it.

    Attributes:
        layout: the sequence.
        window: the window.
        block_size: tokens per (query, key-value) block.
        cost: cost in the layout's own order.
        raster_cost: cost with tokens row by row in 128 x 128 blocks, as in the paper's code.
        rates: rates that times are predicted from.
        num_frames: frames of a video, before the VAE; None for an image.
    """

    layout: Layout
    window: Window
    block_size: tuple[int, int]
    cost: Cost
    raster_cost: Cost
    rates: Rates
    num_frames: int | None = None

    @property
    def layer(self) -> Seconds:
        """Predicted times of one layer: attention, and projections and MLP of this width, for text and image."""
        return layer_seconds(self.cost, self.rates)

    def __str__(self) -> str:
        layout, spent = self.layout, self.cost
        blocks = spent.full + spent.partial + spent.skipped
        layer, executed = self.layer, 1 / spent.predicted_speedup
        text = f"{layout.text_len} of text ({'text first' if layout.text_first else 'text last'})"
        if isinstance(self.window, Disc):
            tokens = f"{layout.height} x {layout.width} image tokens"
            seen = f"window radius {self.window.radius}, {layout.order} order"
        else:
            tokens = (
                f"{self.num_frames} frames, {layout.frames} after the VAE: {layout.frames} x {layout.height} x {layout.width} = "
                f"{layout.image_len} video tokens"
            )
            text = text if layout.text_len else "no text in attention"
            seen = f"window {self.window.name}, tokens in bands of {layout.order[0]} frames x {layout.order[1]} rows"
        head = f"{tokens} and {text}, {seen}, blocks {self.block_size[0]} x {self.block_size[1]}"
        lines = [
            head,
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
                "Do not expect a speed-up: FlexAttention runs at a lower rate than a fused dense kernel, and too little work is "
                "saved. Use a smaller radius or larger images, or keep the model dense."
            )
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Draw one query's window and the block map into a PNG file; return its path."""
        path = Path(path)
        pairs = block_pairs(self.layout, self.window, self.block_size)
        window = window_picture(self.layout, self.window)
        titles = [
            f"what one query sees of {' x '.join(map(str, self.layout.shape[self.num_frames is None :]))} tokens: "
            f"{self.window.name}",
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
    """Density, work and predicted gain for square images as a Markdown table, and the size from which windows gain.

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
    """Predict a transformer layer under a window: 12 parameters per squared channel besides attention."""
    tokens = math.isqrt(spent.dense_pairs)
    linears = 2 * LINEAR_PARAMETERS * spent.channels**2 * tokens
    return Seconds(rates.windowed_s(spent), rates.dense_s(spent), rates.rest_s(linears, tokens * spent.channels))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _rates() -> Rates:
    return rates_for(_device(), torch.bfloat16, HEAD_DIM)


def _block_size(layout: Layout, r: int, rates: Rates) -> tuple[int, int]:
    """Block size of attention without gradients on the device that the rates are for: this one, or a GPU."""
    if rates in PUBLISHED.values():
        return default_block_size(layout.seq_len)
    return choose_tuned(_device(), torch.bfloat16, HEAD_DIM, reach=r, seq_len=layout.seq_len).block_size


def explain_window(
    height: int,
    width: int,
    r: int = 16,
    *,
    num_frames: int | None = None,
    frame_radius: int | str | None = None,
    frames_per_token: int = FRAMES_PER_TOKEN,
    text_len: int | None = None,
    text_first: bool = True,
    px_per_token: int = PX_PER_TOKEN,
    channels: int = CHANNELS,
    block_size: int | tuple[int, int] | None = None,
) -> Explanation:
    """What CLEAR's window of radius ``r`` costs for an image of ``height`` x ``width`` pixels, or a video.

    >>> print(explain_window(1024, 1024, r=8))                            # doctest: +ELLIPSIS
    64 x 64 image tokens and 512 of text (text first), window radius 8, tiled order, blocks 128 x 64
    density             24.33%  of 2.12e+07 pairs
    ...

    Args:
        height, width: image size in pixels; a remainder below ``px_per_token`` is cut off, as in pipelines.
        r: window radius in tokens.
        num_frames: frames of a video, before the VAE; None: an image.
        frame_radius: for a video, as in ``flexclear.transform``: frames after the VAE on either side, or ``"all"``.
        frames_per_token: number of frames after the first that the VAE merges into one: 4, or 8 for LTX.
        text_len: text tokens in attention's sequence: 512 for FLUX.1, 333 for SD3, none for Wan. By default 512, or 0 for a
            video.
        text_first: whether text precedes the image.
        px_per_token: pixels per token and side; 1 if height and width are in tokens.
        channels: heads times head dimension: 3072 for FLUX.1, 5120 for Wan 14B.
        block_size: tokens per block, or a (query, key-value) pair; by default what attention in bfloat16 uses here.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    for name, value in (("height", height), ("width", width)):
        check_int(name, value, px_per_token, None, "in pixels")
    frames = 1 if num_frames is None else frames_after_vae(num_frames, frames_per_token)
    if text_len is None:
        text_len = TEXT_LEN if num_frames is None else 0
    window = _window(r, num_frames, frames, frame_radius)
    layout = Layout(height // px_per_token, width // px_per_token, text_len, text_first, frames=frames)
    rates = _rates()
    pair = _block_size(layout, r, rates) if block_size is None else check_block_size(block_size)
    layout = suited(layout, window)
    return Explanation(
        layout=layout,
        window=window,
        block_size=pair,
        cost=cost(layout, window, channels=channels, block_size=pair),
        raster_cost=cost(layout.with_order("raster"), window, channels=channels, block_size=128),
        rates=rates,
        num_frames=num_frames,
    )


def frames_after_vae(num_frames: int, frames_per_token: int) -> int:
    """Number of frames after a VAE that makes one of the first frame and one of every ``frames_per_token`` after it.

    >>> frames_after_vae(81, 4)
    21

    Raises:
        TypeError, ValueError: it does not take this number; the message names the nearest ones.
    """
    check_int("frames_per_token", frames_per_token, 1, None)
    check_int("num_frames", num_frames, 1, None, "before the VAE")
    whole, rest = divmod(num_frames - 1, frames_per_token)
    if rest:
        low = whole * frames_per_token + 1
        raise ValueError(
            f"num_frames must be {frames_per_token} n + 1, which the VAE turns into n + 1, got {num_frames}; the nearest are "
            f"{low} and {low + frames_per_token}"
        )
    return whole + 1


def _window(r: int, num_frames: int | None, frames: int, frame_radius: int | str | None) -> Window:
    """Make the window of a radius, over the frames that it covers.

    Raises:
        TypeError, ValueError: the frames are not given, or are invalid.
    """
    if num_frames is None:
        if frame_radius is not None:
            raise ValueError(f"frame_radius={frame_radius!r} is for videos; pass num_frames too, or leave it out")
        return Disc(r)
    if frame_radius is None:
        raise ValueError(
            f"num_frames={num_frames} needs a frame_radius, which says in which frames a radius applies: a number of frames "
            f"after the VAE on either side, or {ALL_FRAMES!r}"
        )
    if frame_radius == ALL_FRAMES:
        return all_frames(r)
    if isinstance(frame_radius, str):
        raise ValueError(f"frame_radius must be a number of frames or {ALL_FRAMES!r}, got {frame_radius!r}")
    check_int("frame_radius", frame_radius, 0, None, "in frames after the VAE")
    if frame_radius >= max(frames, 2):
        raise ValueError(
            f"frame_radius={frame_radius}: {num_frames} frames are {frames} after the VAE, so that a window would see all of "
            f"them; {ALL_FRAMES!r} says so"
        )
    return cylinder(r, frame_radius)
