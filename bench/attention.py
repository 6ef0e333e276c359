"""Attention alone: dense SDPA, raster order (the paper's way) and tiled order on the same tensors in one run.

    python bench/attention.py                       # small on CPU, full size on CUDA
    python bench/attention.py --size 128 --r 8 --r 16

Every time stands beside its error against a float32 reference, its density and its executed over useful work. Compile
time is reported apart. Writes JSON and a Markdown table to bench/results/.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from flexclear.attention import windowed_attention
from flexclear.masks import Disc, Layout, block_mask, cost
from flexclear.masks.blocks import default_block_size

from machine import RESULTS, facts, write_results

RASTER_BLOCK = 128


def seconds(run: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """Median time of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def reference(query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: Disc | None, rows: Tensor) -> Tensor:
    """float32 attention of some query rows, masked by the window's own inequality: ``[B, heads, len(rows), D]``."""
    device = query.device
    rows = rows.to(device)
    allowed = torch.ones(len(rows), layout.seq_len, dtype=torch.bool, device=device)
    if window is not None:
        packed = layout.packed_coordinates().to(device)
        q, kv = packed[rows][:, None], packed[None, :]
        dy, dx = (q >> 16) - (kv >> 16), (q & 0xFFFF) - (kv & 0xFFFF)
        allowed = (dy.double() ** 2 + dx.double() ** 2 < window.radius**2) | (q < 0) | (kv < 0)
    return F.scaled_dot_product_attention(query[:, :, rows].float(), key.float(), value.float(), attn_mask=allowed)


def measure(
    side: int, r: int, heads: int, head_dim: int, text_len: int, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """One row per variant at one size and radius."""
    torch.manual_seed(0)
    layout, window = Layout(side, side, text_len), Disc(r)
    raster = layout.with_order("raster")
    query, key, value = torch.randn(3, 1, heads, layout.seq_len, head_dim, device=device, dtype=torch.bfloat16).unbind()
    rows = torch.randperm(layout.seq_len)[:512]
    variants: dict[str, tuple[Layout, Disc | None, int | tuple[int, int]]] = {
        "dense SDPA": (layout, None, 128),
        "raster order, 128 x 128": (raster, window, RASTER_BLOCK),
        **{f"tiled order, {q} x {kv}": (layout, window, (q, kv)) for q, kv in (default_block_size(layout), (64, 64))},
    }
    found = []
    for name, (order, seen, block_size) in variants.items():
        if seen is None:

            def run() -> Tensor:
                return F.scaled_dot_product_attention(query, key, value)
        else:
            mask = block_mask(order, seen, block_size=block_size, device=device)

            def run(mask: Any = mask) -> Tensor:
                return windowed_attention(query, key, value, mask)

        first = seconds(run, device, 1)
        out = run()[:, :, rows.to(device)].float()
        expected = reference(query, key, value, order, seen, rows)
        spent = None if seen is None else cost(order, seen, channels=heads * head_dim, block_size=block_size)
        steady = seconds(run, device, repeats)
        found.append(
            {
                "variant": name,
                "tokens": f"{side} x {side} + {text_len}",
                "r": None if seen is None else r,
                "ms": 1e3 * steady,
                "first_call_s": first - steady,
                "density": 1.0 if spent is None else spent.density,
                "amplification": 1.0 if spent is None else spent.amplification,
                "relative_error": float((out - expected).norm() / expected.norm()),
            }
        )
    dense = found[0]["ms"]
    for row in found:
        row["speedup"] = dense / row["ms"]
        if row["relative_error"] > 1e-2:
            raise AssertionError(f"{row['variant']} is wrong: relative error {row['relative_error']:.2e} to float32")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| image tokens + text | r | variant | ms | vs dense | density | executed / useful | error to float32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['tokens']} | {row['r'] or ''} | {row['variant']} | {row['ms']:.0f} | {row['speedup']:.2f} x | "
        f"{100 * row['density']:.1f} % | {row['amplification']:.2f} | {row['relative_error']:.1e} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main(
    size: Annotated[list[int] | None, typer.Option(help="Side of the picture in tokens; repeat.")] = None,
    r: Annotated[list[int] | None, typer.Option("--r", help="Window radius; repeat.")] = None,
    heads: Annotated[int | None, typer.Option(help="Default: 2 on CPU, FLUX.1's 24 on CUDA.")] = None,
    head_dim: int = 128,
    text_len: int = 512,
    repeats: int = 7,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure and write bench/results/attention-<cpu|cuda>.{json,md}."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = size or ([64, 128, 256, 512] if device.type == "cuda" else [32, 64, 128])
    radii, heads = r or [8, 16], heads or (24 if device.type == "cuda" else 2)
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(sizes) * len(radii))
        for side in sizes:
            for radius in radii:
                rows += measure(side, radius, heads, head_dim, text_len, device, repeats)
                progress.advance(task)
    about = facts(device, dtype="bfloat16", heads=heads, head_dim=head_dim, median_of=repeats)
    write_results(f"attention-{device.type}", about, rows, table(rows), out)
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
