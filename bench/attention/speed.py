"""Attention alone: dense SDPA, raster order (the paper's way) and tiled order on the same tensors in one run.

    python -m bench.attention.speed                       # small on CPU, full size on CUDA
    python -m bench.attention.speed --size 128 --r 8 --r 16

The variants take turns. Every time stands beside its error against a float32 reference, its density and its executed
over useful work. Compile time is reported apart. Writes JSON, a Markdown table and a plot to bench/results/.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from flexclear.masks import Disc, Layout, Window, block_mask, cost
from flexclear.masks.blocks import default_block_size
from flexclear.measuring.attention import reference
from flexclear.runtime.attention import windowed_attention

from bench.machine import RESULTS, facts, write_results

RASTER_BLOCK = 128


@dataclass
class Variant:
    """One way to compute the same attention: what is called, and what it is compared with."""

    name: str
    run: Callable[[], Tensor]
    layout: Layout
    window: Window | None
    block_size: int | tuple[int, int] = RASTER_BLOCK
    first_call_s: float = 0.0
    times: list[float] = field(default_factory=list)


def timed(run: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds of one call, and its result."""
    start = time.perf_counter()
    out = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, out


def variants(query: Tensor, key: Tensor, value: Tensor, layout: Layout, r: int) -> list[Variant]:
    """Dense SDPA, raster order and tiled order."""
    raster, window = layout.with_order("raster"), Disc(r)

    def windowed(order: Layout, block_size: int | tuple[int, int]) -> Callable[[], Tensor]:
        mask = block_mask(order, window, block_size=block_size, device=query.device)
        return lambda: windowed_attention(query, key, value, mask)

    found = [
        Variant("dense SDPA", lambda: F.scaled_dot_product_attention(query, key, value), layout, None),
        Variant("raster order, 128 x 128", windowed(raster, RASTER_BLOCK), raster, window),
    ]
    for q, kv in (default_block_size(layout.seq_len), (64, 64)):
        found.append(Variant(f"tiled order, {q} x {kv}", windowed(layout, (q, kv)), layout, window, (q, kv)))
    return found


def measure(
    side: int, r: int, heads: int, head_dim: int, text_len: int, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """One row per variant at one size and radius; the variants take turns, so that all see the same neighbours."""
    torch.manual_seed(0)
    layout = Layout(side, side, text_len)
    query, key, value = torch.randn(3, 1, heads, layout.seq_len, head_dim, device=device, dtype=torch.bfloat16).unbind()
    rows = text_len + torch.randperm(layout.image_len)[:512]
    present, errors = variants(query, key, value, layout, r), {}
    for variant in present:
        variant.first_call_s, out = timed(variant.run, device)
        expected = reference(query, key, value, variant.layout, variant.window, rows)
        errors[variant.name] = float((out[:, :, rows.to(device)].float() - expected).norm() / expected.norm())
        if errors[variant.name] > 1e-2:
            raise AssertionError(f"{variant.name} is wrong: relative error {errors[variant.name]:.2e} to float32")
    for _ in range(repeats):
        for variant in present:
            variant.times.append(timed(variant.run, device)[0])
    dense = statistics.median(present[0].times)
    found = []
    for variant in present:
        spent = None
        if variant.window is not None:
            spent = cost(variant.layout, variant.window, channels=heads * head_dim, block_size=variant.block_size)
        steady = statistics.median(variant.times)
        found.append(
            {
                "variant": variant.name,
                "tokens": f"{side} x {side} + {text_len}",
                "r": None if spent is None else r,
                "ms": 1e3 * steady,
                "first_call_s": variant.first_call_s - steady,
                "density": 1.0 if spent is None else spent.density,
                "amplification": 1.0 if spent is None else spent.amplification,
                "relative_error": errors[variant.name],
                "speedup": dense / steady,
                "ratios_to_dense": [own / other for own, other in zip(variant.times, present[0].times, strict=True)],
            }
        )
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


def plot(rows: list[dict[str, Any]], title: str) -> Image.Image:
    """Bars: how many times faster than dense SDPA, by size and radius."""
    shown = [row for row in rows if row["r"] is not None]
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=13)
    left, bar, top, scale = 330, 22, 70, 900 / max(1.0, *(row["speedup"] for row in shown)) * 0.8
    picture = Image.new("RGB", (left + 900, top + (bar + 6) * len(shown) + 30), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((16, 12), title, "black", font)
    draw.text((16, 38), "times as fast as dense SDPA in the same run; the line is 1", "#555555", small)
    colours = {"raster": "#b0b0b0", "tiled": "#2c60ce"}
    for index, row in enumerate(shown):
        y = top + index * (bar + 6)
        length = scale * row["speedup"]
        draw.rectangle((left, y, left + length, y + bar), fill=colours[row["variant"].split(" ")[0]])
        draw.text((16, y + 3), f"{row['tokens']}, r = {row['r']}: {row['variant']}", "black", small)
        draw.text((left + length + 6, y + 3), f"{row['speedup']:.2f} x", "black", small)
    draw.line((left + scale, top - 4, left + scale, picture.height - 20), fill="#cc2222", width=2)
    return picture


def main(
    size: Annotated[list[int] | None, typer.Option(help="Side of the image in tokens; repeat.")] = None,
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
    plot(rows, f"Attention, bf16, {heads} heads x {head_dim}: {about['hardware']}").save(
        out / f"attention-{device.type}.png"
    )
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
