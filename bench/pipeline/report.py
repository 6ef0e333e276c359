"""Table and plot of bench/pipeline/run.py, with the paper's published curve."""

from __future__ import annotations

import itertools
import math
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PAPER_SIZES = (1024, 2048, 4096, 8192)
PAPER_DENSE = (4.45, 20.90, 148.97, 1842.48)
PAPER = {8: (4.40, 15.67, 69.41, 293.50), 16: (4.56, 17.19, 83.13, 360.83), 32: (5.45, 19.95, 109.57, 496.22)}
"""Published seconds for 20 steps of FLUX.1-dev on one H100, dense and by radius."""

PX_PER_TOKEN = 16
BASE = "dense"
COLOURS = {"raster order": "#d08000", "flexclear": "#0060c0", "flexclear FP8": "#109040", "dense eager": "#888888"}
SHADES = {8: 4, 16: 2, 32: 1}


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Give each row its speed-up over the compiled dense model at the same size, None where one of them is missing."""
    dense = {row["px"]: row["step_s"] for row in rows if row["variant"] == BASE}
    for row in rows:
        base, own = dense.get(row["px"]), row["step_s"]
        row["speedup"] = base / own if base and own else None


def paper_speedups(r: int) -> list[tuple[int, float]]:
    """(side in pixels, speed-up) as published."""
    return [(px, dense / ours) for px, dense, ours in zip(PAPER_SIZES, PAPER_DENSE, PAPER[r], strict=True)]


def table(rows: list[dict[str, Any]], steps: int) -> str:
    """Markdown."""
    lines = [
        f"| px | tokens | variant | r | s / step | {steps} steps, s | vs dense | compile, s | peak, GiB | error | "
        "unmasked differs by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["px"], row["r"] or 0)):
        head = f"| {row['px']} | {row['tokens']} | {row['variant']} | {row['r'] or ''} |"
        if row["step_s"] is None:
            lines.append(f"{head} not run: {row['why_not']} | | | | | | |")
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
        speed = "" if row["speedup"] is None else f"{row['speedup']:.2f} x"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        unmasked = f"{row['unmasked']:.1e}" if row["unmasked"] else ""
        total = f"{'~ ' if row['extrapolated'] else ''}{row['total_s']:.2f}"
        lines.append(
            f"{head} {row['step_s']:.3f} | {total} | {speed} | {row['compile_s']:.0f} | {peak} | {error} | {unmasked} |"
        )
    notes = [
        "",
        "Seconds per step: median of the timed steps, the first one and what it compiled apart. ~: extrapolated from "
        "fewer timed steps. vs dense: the compiled dense model at the same size is 1. Error: relative, of the model's "
        "output over the smallest size (at most 64 x 64 tokens), to the same weights under masked SDPA with the dense "
        "mask; beside it, how far the model without any mask is from that.",
    ]
    return "\n".join([*lines, *notes]) + "\n"


def plot(rows: list[dict[str, Any]], title: str) -> Image.Image:
    """Speed-up over the compiled dense model by side in tokens: measured solid, published dashed. Both axes log2."""
    curves: list[tuple[str, str, bool, list[tuple[int, float]]]] = []
    keys = dict.fromkeys((row["variant"], row["r"]) for row in rows if row["speedup"] and row["variant"] != BASE)
    for variant, r in keys:
        points = [
            (row["side"], row["speedup"])
            for row in sorted(rows, key=lambda row: row["px"])
            if (row["variant"], row["r"]) == (variant, r) and row["speedup"]
        ]
        label = variant if r is None else f"{variant}, r = {r}"
        curves.append((label, _shade(COLOURS.get(variant, "#000000"), SHADES.get(r or 8, 3)), False, points))
    for r in PAPER:
        points = [(px // PX_PER_TOKEN, speedup) for px, speedup in paper_speedups(r)]
        curves.append((f"paper (FLUX.1-dev, H100), r = {r}", _shade("#b01030", SHADES[r]), True, points))
    return _draw(curves, title)


def _shade(colour: str, strength: int) -> str:
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    weight = {4: 1.0, 3: 0.8, 2: 0.65, 1: 0.4}[strength]
    return "#" + "".join(f"{round(255 - weight * (255 - part)):02x}" for part in parts)


def _draw(curves: list[tuple[str, str, bool, list[tuple[int, float]]]], title: str) -> Image.Image:
    width, height, left, top, right, bottom = 1100, 620, 70, 50, 330, 60
    sides = sorted({side for *_, points in curves for side, _ in points})
    values = [value for *_, points in curves for _, value in points]
    low, high = math.floor(math.log2(min([*values, 1]))), math.ceil(math.log2(max([*values, 2])))
    first, last = math.log2(sides[0]), max(math.log2(sides[-1]), math.log2(sides[0]) + 1)
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)

    def place(side: float, value: float) -> tuple[float, float]:
        x = left + (math.log2(side) - first) / (last - first) * (width - left - right)
        return x, height - bottom - (math.log2(value) - low) / (high - low) * (height - top - bottom)

    draw.text((left, 14), title, "black", font)
    for power in range(low, high + 1):
        y = place(sides[0], 2.0**power)[1]
        draw.line([(left, y), (width - right, y)], "#dddddd" if power else "#888888")
        draw.text((left - 8, y), f"{2.0**power:g} x", "black", font, anchor="rm")
    for side in sides:
        x = place(side, 1)[0]
        draw.line([(x, top), (x, height - bottom)], "#eeeeee")
        draw.text((x, height - bottom + 8), f"{side} x {side}", "black", font, anchor="ma")
    draw.text(((left + width - right) / 2, height - 18), "image in tokens", "black", font, anchor="mm")
    for number, (label, colour, dashed, points) in enumerate(curves):
        corners = [place(*point) for point in points]
        for start, end in itertools.pairwise(corners):
            _line(draw, start, end, colour, dashed)
        for x, y in corners:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=None if dashed else colour, outline=colour, width=2)
        y = top + 22 * number
        _line(draw, (width - right + 20, y), (width - right + 50, y), colour, dashed)
        draw.text((width - right + 58, y), label, "black", font, anchor="lm")
    return picture


def _line(
    draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], colour: str, dashed: bool
) -> None:
    parts = max(1, round(math.dist(start, end) / 6)) if dashed else 1
    for part in range(0, parts, 2):
        ends = [
            tuple(a + (b - a) * share for a, b in zip(start, end, strict=True))
            for share in (part / parts, (part + 1) / parts)
        ]
        draw.line(ends, colour, width=3)
