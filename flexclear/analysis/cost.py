"""What attention costs by size and window: FLOPs from the cost model, and published or measured times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexclear.common.reading import parse_json, read_text
from flexclear.masks import Disc, Layout, cost
from flexclear.masks.checks import check_int

_PUBLISHED = {
    None: (4.45, 20.90, 148.97, 1842.48),
    8: (4.40, 15.67, 69.41, 293.50),
    16: (4.56, 17.19, 83.13, 360.83),
    32: (5.45, 19.95, 109.57, 496.22),
}
_PUBLISHED_SIDES = (1024, 2048, 4096, 8192)


def published_seconds(side: int, radius: int | None) -> float | None:
    """Seconds for 20 steps of FLUX.1-dev on one H100 (arXiv 2412.16112, Table 7); None if the paper does not state them."""
    if side not in _PUBLISHED_SIDES or radius not in _PUBLISHED:
        return None
    return _PUBLISHED[radius][_PUBLISHED_SIDES.index(side)]


@dataclass(frozen=True)
class CostRow:
    """One size under one window.

    Attributes:
        side: side of a square image, in pixels.
        radius: window radius in tokens; None: dense.
        flops: FLOPs of attention, one layer, one sample.
        density: fraction of all pairs that is allowed.
        amplification: pairs executed with block sparsity, divided by pairs allowed; 1 for dense.
        published_seconds: time of 20 steps on one H100, if the paper states it.
    """

    side: int
    radius: int | None
    flops: int
    density: float
    amplification: float
    published_seconds: float | None


def cost_table(
    sides: Sequence[int], radii: Sequence[int], channels: int = 3072, text_len: int = 512, px_per_token: int = 16
) -> list[CostRow]:
    """A row for dense attention and for every radius, at every size.

    Args:
        sides: sides of square images, in pixels.
        radii: window radii, in tokens.
        channels: heads times head dimension; the published figures are FLUX.1's 3072.
        text_len: text tokens.
        px_per_token: side of a token in pixels.

    Raises:
        TypeError, ValueError: a number is invalid.
    """
    check_int("px_per_token", px_per_token, 1, None, "in pixels")
    check_int("channels", channels, 1, None, "channels")
    rows = []
    for side in sides:
        check_int("side", side, px_per_token, None, "in pixels")
        layout = Layout(side // px_per_token, side // px_per_token, text_len)
        dense = 4 * channels * layout.seq_len**2
        rows.append(CostRow(side, None, dense, 1.0, 1.0, published_seconds(side, None)))
        for radius in radii:
            spent = cost(layout, Disc(radius), channels=channels)
            rows.append(
                CostRow(side, radius, spent.flops, spent.density, spent.amplification, published_seconds(side, radius))
            )
    return rows


def markdown(rows: Sequence[CostRow], measured: Sequence[Mapping[str, Any]] = ()) -> str:
    """Format both tables as Markdown."""
    lines = [
        "| px | window | GFLOPs per layer | of dense | executed / useful | published: s for 20 steps | against dense |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = {row.side: row for row in rows if row.radius is None}
    for row in rows:
        full = dense[row.side]
        window = "dense" if row.radius is None else f"r = {row.radius}"
        seconds = against = ""
        if row.published_seconds is not None and full.published_seconds is not None:
            seconds, against = f"{row.published_seconds:.2f}", f"{full.published_seconds / row.published_seconds:.2f} x"
        lines.append(
            f"| {row.side} | {window} | {row.flops / 1e9:.1f} | {row.flops / full.flops:.2%} | {row.amplification:.2f} | "
            f"{seconds} | {against} |"
        )
    if measured:
        lines += ["", "| image tokens + text | r | measured variant | ms | against dense |", "|---|---|---|---|---|"]
        for entry in measured:
            radius = "" if entry["r"] is None else entry["r"]
            speedup = "" if entry.get("speedup") is None else f"{entry['speedup']:.2f} x"
            lines.append(f"| {entry['tokens']} | {radius} | {entry['variant']} | {entry['ms']:.0f} | {speedup} |")
    return "\n".join(lines) + "\n"


def read_measured(folder: Path) -> list[dict[str, Any]]:
    """Rows of attention times (``bench/attention/speed.py``) from the JSON files of a folder such as ``bench/results``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: none of its files has such rows.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    needed = {"variant", "tokens", "r", "ms"}
    found = []
    for file in sorted(folder.glob("attention*.json")):
        try:
            rows = parse_json(read_text(file))["rows"]
            found += [{**row, "file": file.name} for row in rows if needed <= set(row)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a result of bench/attention/speed.py: {error!r}") from error
    if not found:
        raise ValueError(f"{folder} holds no attention*.json of bench/attention/speed.py")
    return found
