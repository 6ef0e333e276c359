"""Tables of the rows that the GPU benchmarks have written: python -m bench.gpu.report rows.jsonl gpu.md"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

Row = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def attention(rows: list[Row]) -> str:
    """Attention by shape and size: each variant beside the fastest dense one and the chosen kernel of the same group."""
    measured = [row for row in rows if "ms" in row]
    dense: dict[tuple[str, int], float] = {}
    chosen: dict[tuple[str, int, int], float] = {}
    for row in measured:
        place = (row["shape"], row["side"])
        if row["variant"].startswith("dense"):
            dense[place] = min(dense.get(place, row["ms"]), row["ms"])
        if row["variant"] == "chosen":
            chosen[(*place, row["r"])] = row["ms"]

    def ratio(to: float | None, own: float) -> str:
        return "" if to is None else f"{to / own:.2f} x"

    lines = [
        [
            row["shape"],
            str(row["px"]),
            "" if row["variant"].startswith("dense") else str(row["r"]),
            row["variant"],
            number(row["ms"], 3),
            ratio(dense.get((row["shape"], row["side"])), row["ms"]),
            ratio(chosen.get((row["shape"], row["side"], row["r"])), row["ms"]),
            number(row.get("executed_tflops"), 0),
            number(row.get("amplification"), 2),
            f"{row['relative_error']:.1e}" if "relative_error" in row else "",
        ]
        for row in measured
    ]
    head = [
        "shape",
        "px",
        "r",
        "variant",
        "ms",
        "vs dense",
        "vs chosen",
        "TFLOP/s executed",
        "executed / useful",
        "error",
    ]
    return table(head, lines) + missing(rows)


def model(rows: list[Row]) -> str:
    """Steps of the model by way and size."""
    measured = [row for row in rows if "ms" in row]
    dense = {row["side"]: row["ms"] for row in measured if row["way"] == "dense"}
    lines = [
        [
            row["way"] + (f" ({row['estimated']})" if "estimated" in row else ""),
            str(16 * row["side"]),
            number(row["ms"], 1),
            f"{dense[row['side']] / row['ms']:.2f} x" if row["side"] in dense else "",
            number(row.get("peak_gb")),
            number(row.get("first_call_s")),
        ]
        for row in measured
    ]
    compiled = [f"{way}: {value:.0f} s" for row in rows for way, value in row.get("compiled first", {}).items()]
    text = table(["way", "px", "ms a step", "vs dense", "peak GB", "first call, s"], lines)
    if compiled:
        text += f"\nFirst step with nothing compiled, one block of each kind: {'; '.join(compiled)}.\n"
    return text + missing(rows)


def missing(rows: list[Row]) -> str:
    """The variants that were not measured, and why."""
    found = []
    for row in rows:
        why = row.get("failed") or row.get("not_run")
        if why is not None:
            name = row.get("variant") or row.get("way")
            found.append(f"- {row.get('shape', '')} {row.get('px', '')} px, {name}: {why}".replace("  ", " "))
    return "\nNot measured:\n" + "\n".join(dict.fromkeys(found)) + "\n" if found else ""


def report(rows: list[Row]) -> str:
    """Everything."""
    parts = []
    about = next((row["facts"] for row in rows if "facts" in row), {})
    parts.append(", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    parts += [row["note"] + "\n" for row in rows if "note" in row]
    ends = [f"{row['stage']}: {row['seconds']} s" + (f", ended with {row['returned']}" if row["returned"] else "")
            for row in rows if "returned" in row]  # fmt: skip
    parts.append("Stages: " + "; ".join(ends) + ".\n")
    makers = {"attention": attention, "flash": attention, "model": model, "warm start": model, "backward": attention}
    for stage, make in makers.items():
        own = [row for row in rows if row["stage"] == stage and "returned" not in row]
        if any("ms" in row or "failed" in row or "not_run" in row for row in own):
            parts.append(f"## {stage.capitalize()}\n\n{make(own)}")
    return "\n".join(parts)


def main(rows: Path, out: Path) -> None:
    """Write the tables."""
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    out.write_text(report(found))


if __name__ == "__main__":
    typer.run(main)
