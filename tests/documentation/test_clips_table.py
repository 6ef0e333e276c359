"""The results page's table of clips: as committed, and as counted now."""

from __future__ import annotations

import json
from pathlib import Path

from flexclear.masks import Layout, all_frames, cost, cylinder, suited

ROOT = Path(__file__).parents[2]
WAN_720P = Layout(45, 80, text_len=0, frames=21)


def test_the_results_page_has_the_table_that_was_counted():
    rows = json.loads((ROOT / "bench" / "results" / "clips.json").read_text())["rows"]
    page = (ROOT / "docs" / "results.md").read_text()
    for label, window in (("cylinder(16, 4)", cylinder(16, 4)), ("all_frames(8)", all_frames(8))):
        row = next(row for row in rows if row["window"] == label and row["layout"].startswith("Wan"))
        order = tuple(row["order"])
        assert suited(WAN_720P, window).order == order
        assert cost(WAN_720P.with_order(order), window, block_size=(128, 64)).amplification == row["chosen"]
    for row in rows[:5]:
        line = next(line for line in page.splitlines() if line.startswith(f"| `{row['window']}` | "))
        assert f"| {row['raster']:.2f} | {row['bands_4_4']:.2f} | **{row['chosen']:.2f}** |" in line
