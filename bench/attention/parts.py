"""What of attention's time on a CPU is the mask, the blocks and the text: one thing changed after the other, in one run.

    python -m bench.attention.parts                                  # two CPU cores: about ten minutes
    python -m bench.attention.parts --grid 64x64 --r 16

"As it was" is one call over blocks of 128 x 64 with coordinates from a table, in bfloat16. "No mask" asks no ``mask_mod`` in any
block: wrong, and the limit of what a mask_mod can gain. Where the CPU has no packed products for bfloat16, flexclear computes in
float32; what is measured in bfloat16 in spite of that says so. Ways take turns; times are medians, ratios medians of the rounds'
ratios, each way checked against float32. Results go to bench/results/parts.{json,md}.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from flexclear.compile import flex
from flexclear.compile.kernels import Kernel, choose
from flexclear.masks import Disc, Layout, block_pairs
from flexclear.masks.blocks import assembled
from flexclear.measuring.attention import check_error, inputs, relative_error, windowed
from flexclear.measuring.timing import timed
from flexclear.runtime.attention import windowed_attention

from bench.machine import RESULTS, facts, write_results

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
CASES = (("64x64", 8), ("64x64", 16), ("128x128", 8), ("128x128", 16), ("85x48", 16), ("91x107", 16))
BEFORE = "as it was"
BLOCKS = ((128, 64), (128, 128), (64, 64), (32, 32))


def in_bfloat16(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``run`` without conversion to float32 around FlexAttention."""

    def converted() -> Tensor:
        packed, flex.PACKED_TYPES = flex.PACKED_TYPES, (DTYPE,)
        try:
            return run()
        finally:
            flex.PACKED_TYPES = packed

    return converted


def without_mask(layout: Layout, r: int, blocks: tuple[int, int], tensors: list[Tensor]) -> Callable[[], Tensor]:
    """The same blocks, none of which asks the ``mask_mod``."""
    pairs = block_pairs(layout, Disc(r), blocks)
    pairs = replace(pairs, full=torch.ones_like(pairs.full))
    mask = assembled(pairs, lambda b, h, q, kv: q >= 0, (layout.seq_len, layout.seq_len), CPU, backward=False)
    return lambda: windowed_attention(*tensors, mask)


def ways(layout: Layout, r: int, tensors: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """All of them, dense attention and what was first."""
    chosen = choose(CPU, DTYPE, tensors[0].shape[-1], reach=r, seq_len=layout.seq_len)
    widens = DTYPE not in flex.PACKED_TYPES
    found: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: F.scaled_dot_product_attention(*tensors),
        BEFORE: in_bfloat16(windowed(layout, r, Kernel((128, 64)), tensors)),
    }
    for blocks in BLOCKS:
        name = f"{blocks[0]} x {blocks[1]}"
        one_call = {
            f"table, {name}": windowed(layout, r, Kernel(blocks), tensors),
            f"computed, {name}": windowed(layout, r, Kernel(blocks, coordinates="computed"), tensors),
            f"no mask, {name}": without_mask(layout, r, blocks, tensors),
        }
        apart = Kernel(blocks, coordinates="computed", text_apart=True)
        both = windowed(layout, r, apart, tensors)
        if widens and blocks != (32, 32):
            found |= {f"{way}, bfloat16": in_bfloat16(run) for way, run in one_call.items()}
            found[f"computed, text apart, {name}, bfloat16"] = in_bfloat16(both)
        if not widens or blocks[0] < 128:
            found |= one_call
            found[f"computed, text apart, {name}" + (" (chosen)" if apart == chosen else "")] = both
    found.pop("table, 128 x 64, bfloat16" if widens else "table, 128 x 64")
    return found


@torch.no_grad()
def measure(layout: Layout, r: int, heads: int, head_dim: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each way.

    Raises:
        ArithmeticError: a result is wrong.
    """
    tensors = inputs(layout, heads, head_dim, CPU, DTYPE)
    runs, errors = ways(layout, r, tensors), {}
    for name, run in runs.items():
        out = run()
        if not name.startswith("no mask"):
            errors[name] = relative_error(out, tensors, layout, None if name == "dense" else Disc(r))
            check_error(errors[name], DTYPE, f"{name} over {layout.height} x {layout.width}, r = {r},")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run, CPU))

    def ratio(name: str, other: str) -> float:
        return statistics.median(before / after for before, after in zip(times[other], times[name], strict=True))

    return [
        {
            "grid": f"{layout.height}x{layout.width}",
            "text": layout.text_len,
            "r": r,
            "way": name,
            "ms": 1e3 * statistics.median(found),
            "times_s": found,
            "x_dense": ratio(name, "dense"),
            "x_before": ratio(name, BEFORE),
            "error": errors.get(name),
        }
        for name, found in times.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| image tokens | r | way | ms | x dense | x as it was | error to float32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = "wrong" if row["error"] is None else f"{row['error']:.1e}"
        lines.append(
            f"| {row['grid'].replace('x', ' x ')} | {row['r']} | {row['way']} | {row['ms']:.1f} | {row['x_dense']:.2f} | "
            f"{row['x_before']:.2f} | {error} |"
        )
    return "\n".join(lines) + "\n"


def main(
    grid: Annotated[list[str] | None, typer.Option(help="Rows x columns of image tokens; repeat.")] = None,
    r: Annotated[list[int] | None, typer.Option("--r", help="Window radius; repeat.")] = None,
    heads: int = 2,
    head_dim: int = 128,
    text_len: int = 512,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure and write."""
    console, rows = Console(stderr=True), []
    for name, radius in [one for one in CASES if (not grid or one[0] in grid) and (not r or one[1] in r)]:
        height, width = map(int, name.split("x"))
        rows += measure(Layout(height, width, text_len), radius, heads, head_dim, rounds)
        console.print(f"{name}, r = {radius}", highlight=False)
    about = facts(CPU, dtype="bfloat16", heads=heads, head_dim=head_dim, text=text_len, median_of=rounds)
    write_results("parts", about, rows, table(rows), out)
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
