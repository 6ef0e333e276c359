"""Curves as PNG files; needs matplotlib (the ``eval`` extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flexclear.analysis.attention import Observed
from flexclear.analysis.cost import CostRow
from flexclear.common.extras import require
from flexclear.compile.files import whole_file


def _figure(columns: int, height: float = 4.2) -> tuple[Any, Any]:
    require("matplotlib", "plotting")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * columns, height), layout="constrained")
    return figure, [figure.add_subplot(1, columns, number + 1) for number in range(columns)]


def _save(figure: Any, path: Path) -> Path:
    with whole_file(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
    return path


def plot_mass(found: Sequence[Observed], path: Path) -> Path:
    """Plot mass against distance for every layer (the paper's Figure 4), averaged over steps: per distance and cumulative."""
    figure, (left, right) = _figure(2)
    names = list(dict.fromkeys(one.layer for one in found))
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    for number, name in enumerate(names):
        own = [one for one in found if one.layer == name]
        mean = torch.stack([one.mass.mean(0) for one in own]).mean(0)
        colour = colours(number / max(len(names) - 1, 1))
        label = name if len(names) <= 8 else None
        left.plot(range(len(mean)), mean, color=colour, linewidth=1, label=label)
        right.plot(range(1, len(mean) + 1), mean.cumsum(0), color=colour, linewidth=1)
    flat = found[0].uniform
    left.plot(range(len(flat)), flat, "k--", linewidth=1, label="equal weights")
    right.plot(range(1, len(flat) + 1), flat.cumsum(0), "k--", linewidth=1)
    left.set(xlabel="distance in tokens", ylabel="share of the mass on image keys", ylim=(0, None))
    right.set(xlabel="distance in tokens", ylabel="mass nearer than that", ylim=(0, 1.02))
    left.legend(fontsize=7)
    return _save(figure, path)


def plot_cost(rows: Sequence[CostRow], measured: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Plot FLOPs, published times, and measured times if there are any, by size (the paper's Figure 2)."""
    figure, axes = _figure(3 if measured else 2)
    radii = list(dict.fromkeys(row.radius for row in rows))
    for radius in radii:
        own = [row for row in rows if row.radius == radius]
        label = "dense" if radius is None else f"r = {radius}"
        axes[0].loglog([row.side for row in own], [row.flops / 1e9 for row in own], "o-", label=label)
        timed = [row for row in own if row.published_seconds is not None]
        if timed:
            axes[1].loglog([row.side for row in timed], [row.published_seconds for row in timed], "o-", label=label)
    axes[0].set(xlabel="side in px", ylabel="GFLOPs of attention per layer")
    axes[1].set(xlabel="side in px", ylabel="s for 20 steps, one H100, as published")
    if measured:
        labels = [
            f"{m['tokens']}, r = {m['r']}: {m['variant']}" if m["r"] else f"{m['tokens']}: {m['variant']}"
            for m in measured
        ]
        axes[2].barh(range(len(labels)), [m["ms"] for m in measured])
        axes[2].set_yticks(range(len(labels)), labels, fontsize=5)
        axes[2].invert_yaxis()
        axes[2].set(xlabel="ms, measured", xscale="log")
    for one in axes[:2]:
        one.set_xticks(sorted({row.side for row in rows}), [str(side) for side in sorted({row.side for row in rows})])
        one.minorticks_off()
        if one.get_legend_handles_labels()[1]:
            one.legend(fontsize=8)
    return _save(figure, path)
