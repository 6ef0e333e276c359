"""One image on 1 to 64 GPUs, on paper: measured times of one device, bytes of the plan, and the bandwidth of the link.

Single-device times are the paper's (one H100, FLUX.1-dev, bf16, r = 16, seconds of 20 steps; arXiv 2412.16112, figure and
table of times); above 8192 px the last time per token is taken. Every rank computes all text, at the same time per token.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexclear.masks import Disc, Layout
from flexclear.parallel.costs import border_bytes, output_bytes, text_bytes
from flexclear.parallel.planning import cut

STEPS = 20
WINDOWED = {1024: 4.56, 2048: 17.19, 4096: 83.13, 8192: 360.83}
DENSE_8K = 1842.48
REST_8K = 225.0
"""Of the 8192 px times, what is no attention (fitted; see the design notes)."""
HEADS, HEAD_DIM, LAYERS, TEXT, CHANNELS = 24, 128, 57, 512, 64
RADIUS = 16
PIXELS = (8192, 16384, 32768)
GPUS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Link:
    """A way between two GPUs: bytes per second that a GPU can send, and seconds before the first byte."""

    name: str
    bandwidth: float
    latency: float


NVLINK = Link("NVLink, 300 GB/s", 300e9, 10e-6)
INFINIBAND = Link("InfiniBand, 40 GB/s", 40e9, 25e-6)


def link_of(gpus: int) -> Link:
    """NVLink inside a machine of eight, InfiniBand between machines."""
    return NVLINK if gpus <= 8 else INFINIBAND


def compute_seconds(pixels: int, gpus: int) -> float:
    """One step on the busiest rank: its own tokens and all text, at one device's time per token."""
    tokens = (pixels // 16) ** 2
    per_token = WINDOWED[min(pixels, 8192)] / STEPS / ((min(pixels, 8192) // 16) ** 2 + TEXT)
    layout = Layout(pixels // 16, pixels // 16, TEXT)
    edges = cut(layout, gpus).edges
    share = max(b - a for a, b in itertools.pairwise(edges)) / (pixels // 16)
    return per_token * (tokens * share + TEXT)


def row(pixels: int, gpus: int, link: Link | None = None) -> dict[str, Any]:
    """Predicted seconds of one step, synchronous, stale, and dense by ring attention."""
    link = link or link_of(gpus)
    side = pixels // 16
    layout = Layout(side, side, TEXT)
    bands = cut(layout, gpus)
    middle = gpus // 2
    width = HEADS * HEAD_DIM
    border = border_bytes(layout, Disc(RADIUS), bands, middle, width) if gpus > 1 else 0
    text = text_bytes(TEXT, HEADS, HEAD_DIM) if gpus > 1 else 0
    output = output_bytes(layout, bands, CHANNELS)
    compute = compute_seconds(pixels, gpus)
    border_seconds = LAYERS * (border / link.bandwidth + link.latency) if gpus > 1 else 0.0
    ring = 2 * (gpus - 1) / gpus
    sums = LAYERS * (ring * text / link.bandwidth + 2 * 2 * (gpus - 1) * link.latency / 2) if gpus > 1 else 0.0
    gather = (gpus - 1) * output / link.bandwidth if gpus > 1 else 0.0
    sync = compute + border_seconds + sums + gather
    stale = max(compute, border_seconds) + sums + gather
    attention = (DENSE_8K - REST_8K) / STEPS * (pixels / 8192) ** 4
    rest = REST_8K / STEPS * (pixels / 8192) ** 2
    passed = (gpus - 1) / gpus * side * side * width * 2 * 2 * LAYERS / link.bandwidth
    return {
        "pixels": pixels,
        "gpus": gpus,
        "link": link.name if gpus > 1 else "",
        "border_mb_per_layer": border / 1e6,
        "text_mb_per_layer": text / 1e6,
        "compute_s": compute,
        "border_s": border_seconds,
        "text_s": sums,
        "output_s": gather,
        "sync_s": sync,
        "stale_s": stale,
        "speed_up_sync": compute_seconds(pixels, 1) / sync,
        "speed_up_stale": compute_seconds(pixels, 1) / stale,
        "dense_ring_s": max((attention + rest) / gpus, passed),
    }


def rows() -> list[dict[str, Any]]:
    """All sizes and numbers of GPUs for which the image is large enough."""
    return [row(pixels, gpus) for pixels in PIXELS for gpus in GPUS if pixels // 128 >= gpus]


def table(found: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = (
        "| px | GPUs | border, MB per layer | compute, s | borders, s | text, s | output, s | step sync, s | speed-up "
        "| stale, s | speed-up | dense ring, s |\n" + "|---" * 12 + "|\n"
    )
    lines = [
        f"| {f['pixels']} | {f['gpus']} | {f['border_mb_per_layer']:.0f} | {f['compute_s']:.3f} | {f['border_s']:.3f} | "
        f"{f['text_s']:.3f} | {f['output_s']:.3f} | {f['sync_s']:.3f} | {f['speed_up_sync']:.1f} | {f['stale_s']:.3f} | "
        f"{f['speed_up_stale']:.1f} | {f['dense_ring_s']:.1f} |"
        for f in found
    ]
    return head + "\n".join(lines) + "\n"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.2))
    for pixels, colour in zip(PIXELS, ("C0", "C1", "C2"), strict=True):
        these = [f for f in found if f["pixels"] == pixels]
        gpus = [f["gpus"] for f in these]
        axes.plot(gpus, [f["speed_up_sync"] for f in these], colour, marker="o", label=f"{pixels} px, sync")
        axes.plot(
            gpus, [f["speed_up_stale"] for f in these], colour, marker="o", linestyle=":", label=f"{pixels} px, stale"
        )
    axes.plot(GPUS, GPUS, "0.7", label="ideal")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(GPUS, map(str, GPUS))
    axes.set_yticks(GPUS, map(str, GPUS))
    axes.set_xlabel("H100 (eight a machine)")
    axes.set_ylabel("speed-up of a step, predicted")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
