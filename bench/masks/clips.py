"""What windows over a video execute, over what they use, in several token orders; and sliding tiles of the same coverage.

    python -m bench.masks.clips                                # some minutes; nothing is timed

Exact, from the block lists alone. Sliding tiles execute whole tiles of the grid that is padded to whole tiles, as that method
runs (arXiv 2502.04507), the smallest window of tiles that holds the tube around every query. Results go to
bench/results/clips.{json,md}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from flexclear.masks import Layout, TileWindow, Tube, all_frames, ball, cost, cylinder, radial, suited

from bench.machine import RESULTS, facts, write_results

LAYOUTS = {
    "Wan, 81 frames, 720 x 1280": Layout(45, 80, 0, frames=21),
    "HunyuanVideo, 129 frames, 720 x 1280": Layout(45, 80, 256, False, frames=33),
    "13 x 31 x 53": Layout(31, 53, 0, frames=13),
}
WINDOWS = {
    "cylinder(16, 4)": cylinder(16, 4),
    "cylinder(8, 1)": cylinder(8, 1),
    "all_frames(8)": all_frames(8),
    "ball(16, 4)": ball(16, 4),
    "radial(32)": radial(32),
}
TILE = (6, 8, 8)
BLOCKS = (128, 64)


def tiles_around(window: Tube, layout: Layout) -> TileWindow | None:
    """The smallest window of tiles that holds ``window`` around every query; None where that is everything."""
    reach = (
        window.frame_radius if window.frame_radius is not None else layout.frames,
        window.reach - 1,
        window.reach - 1,
    )
    counts = tuple(2 * -(-far // tile) + 1 for far, tile in zip(reach, TILE, strict=True))
    there = tuple(-(-side // tile) for side, tile in zip(layout.shape, TILE, strict=True))
    if all(count >= all_of for count, all_of in zip(counts, there, strict=True)):
        return None
    return TileWindow(TILE, counts)


def row(name: str, layout: Layout, label: str, window: Tube) -> dict[str, Any]:
    """Executed over useful, order by order."""
    chosen = suited(layout, window)
    found = {order: cost(layout.with_order(order), window, block_size=BLOCKS) for order in ("raster", (4, 4))}
    own = cost(chosen, window, block_size=BLOCKS)
    tiles = tiles_around(window, layout)
    by_tiles = None
    if tiles is not None:
        frames, height, width = (-(-side // tile) * tile for side, tile in zip(layout.shape, TILE, strict=True))
        padded = Layout(height, width, 0, frames=frames, order="raster")
        image = tiles.image_pairs(padded)
        assert image is not None
        by_tiles = (image + layout.text_len * (2 * padded.image_len + layout.text_len)) / own.pairs
    return {
        "layout": name,
        "window": label,
        "density": own.density,
        "raster": found["raster"].amplification,
        "bands_4_4": found[4, 4].amplification,
        "chosen": own.amplification,
        "order": chosen.order,
        "full": own.full / (own.full + own.partial),
        "dense_over_executed": own.predicted_speedup,
        "tiles": None if tiles is None else tiles.window,
        "tiles_over_useful": by_tiles,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| tokens | window | allowed, % | raster | bands (4, 4) | **chosen** | bands | dense over executed | "
        "sliding tiles (6, 8, 8) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        tiles = one["tiles_over_useful"]
        by_tiles = "everything" if tiles is None else f"{tiles:.2f} ({' x '.join(map(str, one['tiles']))})"
        lines.append(
            f"| {one['layout']} | {one['window']} | {100 * one['density']:.2f} | {one['raster']:.2f} | {one['bands_4_4']:.2f} | "
            f"**{one['chosen']:.2f}** | {tuple(one['order'])} | {one['dense_over_executed']:.1f} | {by_tiles} |"
        )
    return "Executed over useful pairs.\n\n" + "\n".join(lines) + "\n"


def main(out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS) -> None:
    """Count and write."""
    console, rows = Console(stderr=True), []
    for name, layout in LAYOUTS.items():
        for label, window in WINDOWS.items():
            rows.append(row(name, layout, label, window))
            console.print(f"{name}, {label}", highlight=False)
    write_results("clips", facts(torch.device("cpu"), blocks=BLOCKS), rows, table(rows), out)
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
