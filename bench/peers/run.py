"""Local attention by what people would pick, on the same tensors in one run, each checked against float32.

    python -m bench.peers.run                                            # two CPU cores: some minutes
    python -m bench.peers.run --size 64 --r 8 --append                   # one size and radius anew, other rows kept
    pip install --no-deps --no-build-isolation --target FOLDER natten==0.21.7
    python -m bench.peers.run --natten FOLDER

Ways take turns; a slow one has fewer rounds, and the table says how many. Compiling and ordering tokens are not in the times.
Then the work that each executes at 1024 to 8192 px, counted. Results go to bench/results/peers.{json,md}.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from flexclear.masks import Layout
from flexclear.measuring.attention import check_error, first_call, inputs, relative_error
from flexclear.measuring.timing import timed

from bench.machine import RESULTS, facts, write_results
from bench.peers.ways import Way, all_ways, find_natten

DTYPE = torch.bfloat16
SLOW_S, SLOW_ROUNDS = 3.0, 3
VERY_SLOW_S = 15.0
"""Seconds of a call from which on there are ``SLOW_ROUNDS`` rounds, and one."""


def measure(side: int, r: int, heads: int, head_dim: int, text_len: int, rounds: int, on: Any) -> list[dict[str, Any]]:
    """A row for each way at one size and radius.

    Raises:
        ArithmeticError: a result is wrong.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = Layout(side, side, text_len, order="raster")
    tensors = [tokens.contiguous() for tokens in inputs(layout, heads, head_dim, device, DTYPE)]
    ways = all_ways(layout, r, tensors)
    first: dict[str, float] = {}
    errors: dict[str, float] = {}
    for way in ways:
        if way.run is None:
            continue
        on(f"{side} x {side}, r = {r}: {way.name}")
        _, out = first_call(way.run, device)
        errors[way.name] = _error(way, way.finish(out), tensors, layout)
        check_error(errors[way.name], DTYPE, f"{way.name} at {side} x {side}, r = {r},")
        del out
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(rounds):
        for way in ways:
            # What the others are compared with is in every round.
            if way.run is None or (way is not ways[0] and number >= _rounds(times[way.name], rounds)):
                continue
            on(f"{side} x {side}, r = {r}: {way.name}, round {number + 1}")
            times[way.name].append(timed(way.run, device))
        if number == 0:
            first = {name: own[0] for name, own in times.items() if own}
    dense = times[ways[0].name]
    rows = []
    for way in ways:
        own = times[way.name]
        rows.append(
            {
                "way": way.name,
                "side": side,
                "tokens": f"{side} x {side} + {text_len}",
                "r": r,
                "why_not": way.why_not,
                "ms": 1e3 * statistics.median(own) if own else None,
                "gain": statistics.median(dense) / statistics.median(own) if own else None,
                "first_round_s": first.get(way.name),
                "times_s": own,
                "error": errors.get(way.name),
                "executed": way.executed,
                "useful": way.useful,
            }
        )
    return rows


def _rounds(times: list[float], rounds: int) -> int:
    if not times or times[0] < SLOW_S:
        return rounds
    return SLOW_ROUNDS if times[0] < VERY_SLOW_S else 1


def _error(way: Way, out: Tensor, tensors: list[Tensor], layout: Layout) -> float:
    """Relative error to float32 over what the way computes: all tokens, or those of the image."""
    skipped = layout.seq_len - way.layout.seq_len
    return relative_error(out, [tokens[:, :, skipped:] for tokens in tensors], way.layout, way.window)


def executed_work(sides: list[int], radii: list[int], text_len: int) -> list[dict[str, Any]]:
    """Pairs that each way executes, counted: a row for each size, radius and way."""
    rows = []
    for side in sides:
        layout = Layout(side, side, text_len, order="raster")
        for r in radii:
            for way in all_ways(layout, r, None):
                rows.append(
                    {
                        "way": way.name,
                        "px": 16 * side,
                        "r": r,
                        "executed": way.executed,
                        "useful": way.useful,
                        "of_dense": way.executed / layout.seq_len**2,
                    }
                )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Times, as Markdown."""
    lines = [
        "| image tokens + text | r | way | ms | times as fast as dense | executed / useful | rounds | error to float32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['tokens']} | {row['r']} | {row['way']} |"
        work = f"{row['executed'] / row['useful']:.2f}"
        if row["ms"] is None:
            lines.append(f"{head} not run: {row['why_not']} | | {work} | | |")
        else:
            lines.append(
                f"{head} {row['ms']:.0f} | {row['gain']:.2f} x | {work} | {len(row['times_s'])} | {row['error']:.1e} |"
            )
    return "\n".join(lines) + "\n"


def work_table(rows: list[dict[str, Any]]) -> str:
    """Executed work, as Markdown: a line for each way and radius."""
    sides = sorted({row["px"] for row in rows})
    lines = [
        "| r | way | " + " | ".join(f"{px} px" for px in sides) + " |",
        "|---|---|" + "---|" * len(sides),
    ]
    # Ours without its blocks, which may differ from size to size.
    found = {(row["r"], row["way"].split(", blocks ")[0], row["px"]): row for row in rows}
    for r, name in dict.fromkeys((r, name) for r, name, _ in found):
        cells = []
        for px in sides:
            row = found[r, name, px]
            cells.append(f"{row['of_dense']:.2%} ({row['executed'] / row['useful']:.2f})")
        lines.append(f"| {r} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def earlier(file: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run on this machine.

    Raises:
        ValueError: it was another machine, or another setting.
    """
    if not file.is_file():
        return []
    content = json.loads(file.read_text())
    changed = [key for key, value in about.items() if content["facts"].get(key) != value]
    if changed:
        raise ValueError(f"--append: {file} was measured with another {', '.join(changed)}; move it away first")
    return [row for row in content["rows"] if "ms" in row]


def main(
    size: Annotated[list[int] | None, typer.Option(help="Side in tokens, a power of two; repeat.")] = None,
    r: Annotated[list[int] | None, typer.Option("--r", help="Window radius; repeat.")] = None,
    heads: int = 2,
    head_dim: int = 128,
    text_len: Annotated[int, typer.Option(help="Text tokens, a multiple of 128.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 7,
    natten: Annotated[
        str | None, typer.Option(help="Folder that NATTEN is in, where it is not installed.", envvar="NATTEN_FOLDER")
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="Keep rows of earlier runs that are not run anew.")] = False,
    work: Annotated[bool, typer.Option(help="Count executed work at 1024 to 8192 px too.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure, count, and write bench/results/peers.{json,md}."""
    os.environ.setdefault("NATTEN_LOG_LEVEL", "CRITICAL")
    find_natten(natten)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = facts(
        device, dtype="bfloat16", heads=heads, head_dim=head_dim, text_len=text_len, median_of=f"up to {rounds}"
    )
    rows = earlier(out / "peers.json", about) if append else []
    with torch.no_grad(), Console(stderr=True).status("") as status:
        for side in size or [64, 128]:
            for radius in r or [8, 16]:
                new = measure(side, radius, heads, head_dim, text_len, rounds, status.update)
                rows = [row for row in rows if (row["side"], row["r"]) != (side, radius)] + new
        rows.sort(key=lambda row: (row["side"], row["r"]))
        status.update("executed work")
        counted = executed_work([64, 128, 256, 512], [8, 16, 32], text_len) if work else []
    text = table(rows)
    if counted:
        text += "\nExecuted work, of dense attention's (executed over useful):\n\n" + work_table(counted)
    write_results("peers", about, [*rows, *counted], text, out)
    print(text)


if __name__ == "__main__":
    typer.run(main)
