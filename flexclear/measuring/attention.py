"""Attention alone at a model's shapes: dense SDPA and windows on the same tensors in turn, each with its error to float32."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexclear.compile.kernels import Kernel
from flexclear.compile.tuned import choose_tuned
from flexclear.masks import Cost, Disc, Layout, Window, cost
from flexclear.measuring.timing import in_turns, synchronize
from flexclear.runtime.attention import windowed_attention
from flexclear.runtime.plan import build_plan

SAMPLED = 64
"""Number of query rows of each kind, text and image, that are compared with float32."""

LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative errors from which on a result counts as wrong: twice what rounding weights, values and results to the type can
cause, and TF32 for float32 on GPUs."""


@dataclass(frozen=True)
class Attention:
    """Attention over one layout, timed.

    Attributes:
        layout: the sequence.
        radius: the window's radius; None: dense.
        kernel: the window's blocks and options; None: dense.
        cost: the window's cost; for dense attention, all pairs.
        seconds: time of each call.
        first_s: time of the first call, which may compile.
        error: relative error of sampled rows, compared with float32 under the window's own inequality.
    """

    layout: Layout
    radius: int | None
    kernel: Kernel | None
    cost: Cost
    seconds: list[float]
    first_s: float
    error: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def inputs(layout: Layout, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value ``[1, heads, N, head_dim]`` in the memory layout of projections: heads side by side."""
    generator = torch.Generator(device).manual_seed(0)
    size = (1, layout.seq_len, heads, head_dim)
    return [torch.randn(size, generator=generator, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]


def reference(query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: Window | None, rows: Tensor) -> Tensor:
    """float32 attention of some query rows, masked by the window's own inequality: ``[B, heads, len(rows), D]``."""
    device = query.device
    rows = rows.to(device)
    allowed = torch.ones(len(rows), layout.seq_len, dtype=torch.bool, device=device)
    if window is not None:
        packed = layout.packed_coordinates().to(device)
        q, kv = packed[rows][:, None], packed[None, :]
        inside = window.rule(layout, lambda number: torch.tensor(number, dtype=torch.int64, device=device))
        query_at, key_at = (layout.packing.unpack(tokens.long()) for tokens in (q, kv))
        allowed = inside(query_at, key_at) | (q < 0) | (kv < 0)
    return F.scaled_dot_product_attention(query[:, :, rows].float(), key.float(), value.float(), attn_mask=allowed)


def relative_error(out: Tensor, tensors: list[Tensor], layout: Layout, window: Window | None) -> float:
    """Relative error of sampled text and image rows of ``out``, compared with float32."""
    generator = torch.Generator().manual_seed(0)
    image = layout.image_start + torch.randperm(layout.image_len, generator=generator)[:SAMPLED]
    start = 0 if layout.text_first else layout.image_len
    text = start + torch.randperm(layout.text_len, generator=generator)[:SAMPLED]
    rows = torch.cat([image, text])
    query, key, value = tensors
    # One head at a time: float32 copies of all heads would take several times the memory that is measured.
    square = difference = 0.0
    for head in range(query.shape[1]):
        one = slice(head, head + 1)
        expected = reference(query[:, one], key[:, one], value[:, one], layout, window, rows)
        found = out[:, head : head + 1, rows.to(out.device)].float()
        difference += float((found - expected).square().sum())
        square += float(expected.square().sum())
    return (difference / square) ** 0.5


def windowed(layout: Layout, radius: int, kernel: Kernel, tensors: list[Tensor]) -> Callable[[], Tensor]:
    """A call of windowed attention, made as in a transformed model."""
    query, key, value = tensors
    mask = build_plan(layout, Disc(radius), "flex", kernel, query.device, backward=False).mask
    return lambda: windowed_attention(query, key, value, mask)


def first_call(run: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Time a first call in seconds; return its result too."""
    start = time.perf_counter()
    out = run()
    synchronize(device)
    return time.perf_counter() - start, out


def check_error(error: float, dtype: torch.dtype, what: str) -> None:
    """Raise for a wrong result, whose time would mean nothing.

    Raises:
        ArithmeticError: the result is wrong.
    """
    if not error <= LARGEST_ERROR[dtype]:
        raise ArithmeticError(f"{what} is wrong here: relative error {error:.1e} to float32")


@torch.no_grad()
def measure_attention(
    layout: Layout,
    radii: list[int],
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int,
    seconds: float,
    on_round: Callable[[], None] = lambda: None,
) -> list[Attention]:
    """Measure dense attention, then the window of each radius, over ``layout``.

    Raises:
        ArithmeticError: a result is wrong.
    """
    tensors = inputs(layout, heads, head_dim, device, dtype)
    query, key, value = tensors
    runs: dict[str, Callable[[], Tensor]] = {"dense": lambda: F.scaled_dot_product_attention(query, key, value)}
    about: dict[str, dict[str, Any]] = {"dense": {"radius": None, "kernel": None}}
    for radius in radii:
        kernel = choose_tuned(device, dtype, head_dim, reach=radius, seq_len=layout.seq_len)
        name = f"r = {radius}"
        runs[name] = windowed(layout, radius, kernel, tensors)
        about[name] = {"radius": radius, "kernel": kernel}
    found = []
    for name, run in runs.items():
        window = None if about[name]["radius"] is None else Disc(about[name]["radius"])
        about[name]["first_s"], out = first_call(run, device)
        about[name]["error"] = relative_error(out, tensors, layout, window)
        check_error(about[name]["error"], dtype, f"attention, {name}, over {layout.height} x {layout.width} tokens")
    times = in_turns(runs, device, repeats, seconds, on_round)
    for name, facts in about.items():
        if facts["kernel"] is None:
            pairs = layout.seq_len**2
            spent = Cost(pairs, pairs, pairs, 1, 0, 0, heads * head_dim)
        else:
            size = facts["kernel"].block_size
            spent = cost(layout, Disc(facts["radius"]), channels=heads * head_dim, block_size=size)
        found.append(Attention(layout=layout, cost=spent, seconds=times[name], **facts))
    return found
