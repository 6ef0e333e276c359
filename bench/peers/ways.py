"""Every way to compute local attention that is compared: how it is called, and how much work it executes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from flexclear.compile.kernels import choose
from flexclear.masks import Disc, Layout, Neighborhood, Window, block_mask, block_pairs, cost, dense_mask
from flexclear.masks.blocks import pairs_between
from flexclear.masks.windows import MaskMod
from flexclear.measuring.attention import windowed

from bench.peers.gathered import Gathered
from bench.peers.orders import by_bits, by_division, disc_mod, morton_order, natten_mod

BLOCK = 128
"""Blocks of ``create_block_mask`` where nothing else is asked for, as the released code and attention-gym have them."""


@dataclass(frozen=True)
class Way:
    """One way to compute attention.

    Attributes:
        name: in tables.
        layout: what the result is compared over, in raster order.
        window: which pairs it allows; None: all.
        run: computes it; None: only its work is known here.
        finish: what ``run`` returns, as ``[1, heads, N, D]`` in raster order.
        executed: pairs that it computes, of the whole sequence.
        why_not: why it does not run here.
    """

    name: str
    layout: Layout
    window: Window | None
    executed: int
    run: Callable[[], Tensor] | None = None
    finish: Callable[[Tensor], Tensor] = lambda out: out
    why_not: str | None = None

    @property
    def useful(self) -> int:
        """Pairs that its window allows."""
        if self.window is None:
            return self.layout.seq_len**2
        return cost(self.layout, self.window, block_size=BLOCK).pairs


def all_ways(layout: Layout, r: int, tensors: list[Tensor] | None) -> list[Way]:
    """Every way at one size and radius; without ``tensors`` (query, key and value in raster order) only their work."""
    return [
        dense(layout, tensors),
        ours(layout, r, tensors),
        released(layout, r, tensors),
        morton(layout, r, tensors),
        morton_natten(layout, r, tensors),
        masked(layout, r, tensors),
        gathered(layout, r, tensors),
        natten(layout, r, tensors),
    ]


def dense(layout: Layout, tensors: list[Tensor] | None) -> Way:
    """No window."""
    run = None if tensors is None else partial(F.scaled_dot_product_attention, *tensors)
    return Way("dense SDPA", layout, None, layout.seq_len**2, run)


def ours(layout: Layout, r: int, tensors: list[Tensor] | None) -> Way:
    """As a transformed model runs it."""
    own = layout.with_order("tiled")
    device = torch.device("cpu") if tensors is None else tensors[0].device
    kernel = choose(device, torch.bfloat16, 128, reach=r, seq_len=layout.seq_len)
    executed = cost(own, Disc(r), block_size=kernel.block_size).executed_pairs
    name = f"flexclear, blocks {kernel.block_size[0]} x {kernel.block_size[1]}"
    if tensors is None:
        return Way(name, layout, Disc(r), executed)
    there, back = _orders(layout, own.permutation().to(device))
    run = windowed(own, r, kernel, [tokens[:, :, there] for tokens in tensors])
    return Way(name, layout, Disc(r), executed, run, lambda out: out[:, :, back])


def released(layout: Layout, r: int, tensors: list[Tensor] | None) -> Way:
    """The paper's released code."""
    executed = cost(layout, Disc(r), block_size=BLOCK).executed_pairs
    mod = disc_mod(by_division(layout.width), layout.text_len, r)
    return _flex("released code: raster order", layout, Disc(r), executed, mod, None, tensors)


def morton(layout: Layout, r: int, tensors: list[Tensor] | None) -> Way:
    """CLEAR's window in attention-gym's Morton order."""
    mod = disc_mod(by_bits, layout.text_len, r)
    name = "attention-gym: Morton order, the same window"
    return _flex(name, layout, Disc(r), _morton_pairs(layout, Disc(r)), mod, morton_order(layout.width), tensors)


def morton_natten(layout: Layout, r: int, tensors: list[Tensor] | None) -> Way:
    """attention-gym's natten mask in its Morton order."""
    side = 2 * r - 1
    window = Neighborhood(side)
    mod = natten_mod(by_bits, layout.text_len, layout.height, layout.width, side)
    name = f"attention-gym: Morton order, natten mask {side} x {side}"
    return _flex(name, layout, window, _morton_pairs(layout, window), mod, morton_order(layout.width), tensors)


def masked(layout: Layout, r: int, tensors: list[Tensor] | None) -> Way:
    """SDPA with a dense boolean mask."""
    run = None
    if tensors is not None:
        mask = dense_mask(layout, Disc(r), device=tensors[0].device)
        run = partial(F.scaled_dot_product_attention, *tensors, attn_mask=mask)
    return Way("masked SDPA", layout, Disc(r), layout.seq_len**2, run)


def gathered(layout: Layout, r: int, tensors: list[Tensor] | None) -> Way:
    """SDPA over gathered windows."""
    keys = sum(1 for dy in range(1 - r, r) for dx in range(1 - r, r) if dy * dy + dx * dx < r * r)
    executed = layout.text_len * layout.seq_len + layout.image_len * (layout.text_len + keys)
    run = None if tensors is None else partial(Gathered(layout, r, tensors[0].device), *tensors)
    return Way("gather and SDPA", layout, Disc(r), executed, run)


def natten(layout: Layout, r: int, tensors: list[Tensor] | None) -> Way:
    """NATTEN's own operator over the image alone; it has no text. Its work: 8 x 8 tiles, its kernels' default."""
    side = 2 * r - 1
    alone = Layout(layout.height, layout.width, 0, order="raster")
    executed = cost(alone.with_order("tiled"), Neighborhood(side), block_size=64).executed_pairs
    name = f"NATTEN {side} x {side}, no text"
    if tensors is None:
        return Way(name, alone, Neighborhood(side), executed)
    try:
        import natten as library
    except ImportError as error:
        return Way(name, alone, Neighborhood(side), executed, why_not=str(error))
    grid = (layout.height, layout.width)
    image = [tokens[:, :, layout.image_start :].unflatten(2, grid).permute(0, 2, 3, 1, 4) for tokens in tensors]
    options: dict[str, Any] = {"torch_compile": True} if tensors[0].device.type == "cuda" else {}
    return Way(
        f"NATTEN {library.__version__}, {side} x {side}, no text",
        alone,
        Neighborhood(side),
        executed,
        lambda: library.na2d(*image, kernel_size=side, **options),
        lambda out: out.permute(0, 3, 1, 2, 4).flatten(2, 3),
    )


def find_natten(folder: str | None) -> None:
    """Let NATTEN be imported from a folder that ``pip install --target`` made."""
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)


def _flex(
    name: str,
    layout: Layout,
    window: Window,
    executed: int,
    mod: MaskMod,
    order: Tensor | None,
    tensors: list[Tensor] | None,
) -> Way:
    """A ``mask_mod`` of others, compiled as they compile it: for this size alone, over the lists of ``create_block_mask``."""
    if tensors is None:
        return Way(name, layout, window, executed)
    device = tensors[0].device
    # The same lists as create_block_mask's, from the same questions, in bounded memory.
    mask = block_mask(layout, mod, block_size=BLOCK, device=device)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    finish: Callable[[Tensor], Tensor] = lambda out: out  # noqa: E731
    if order is not None:
        there, back = _orders(layout, order.to(device))
        tensors = [tokens[:, :, there] for tokens in tensors]
        finish = lambda out: out[:, :, back]  # noqa: E731
    query, key, value = tensors
    counted = len(block_pairs(layout, mod, BLOCK, device).q) * BLOCK**2
    if counted != executed:
        raise AssertionError(f"{name}: {executed} pairs by boxes, {counted} by its own mask")
    return Way(name, layout, window, executed, lambda: compiled(query, key, value, block_mask=mask), finish)


def _morton_pairs(layout: Layout, window: Window) -> int:
    """Pairs in the blocks that are computed in Morton order: blocks are rectangles, so boxes are exact."""
    order = morton_order(layout.width)
    packed = ((order // layout.width) << 16 | order % layout.width).to(torch.int32)
    tokens = torch.cat([torch.full((layout.text_len,), -1, dtype=torch.int32), packed])
    return len(pairs_between(layout, window, tokens, tokens, (BLOCK, BLOCK)).q) * BLOCK**2


def _orders(layout: Layout, image: Tensor) -> tuple[Tensor, Tensor]:
    """Of the whole sequence, text first: the raster token at each place of an image order, and the inverse."""
    text = torch.arange(layout.text_len, device=image.device)
    there = torch.cat([text, layout.text_len + image])
    return there, torch.argsort(there)
