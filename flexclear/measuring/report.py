"""What ``flexclear bench`` prints and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexclear.measuring.run import Found


def table(found: Found) -> str:
    """Markdown: hardware, a row for each size and window, the fitted rates, and where everything is kept."""
    about, rates = found.about, found.rates
    lines = [
        ", ".join(f"{name} {value}" for name, value in about.items()),
        "",
        "| px | tokens + text | window | attention, ms | gain | executed / useful | error to float32 | step, s | gain | "
        "peak, GiB | error to masked SDPA |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found.rows:
        window = "dense" if row["r"] is None else f"r = {row['r']}, blocks {row['blocks'][0]} x {row['blocks'][1]}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        error = "" if row["step_error"] is None else f"{row['step_error']:.1e}"
        work = "" if row["r"] is None else f"{row['executed_over_useful']:.2f}"
        lines.append(
            f"| {row['px']} | {row['tokens']} | {window} | {row['attention_ms']:.4g} | {row['attention_gain']:.2f} x | "
            f"{work} | {row['attention_error']:.1e} | {row['step_s']:.4g} | {row['step_gain']:.2f} x | {peak} | {error} |"
        )
    reckoned = (
        "all blocks were run"
        if about["blocks"] == about["blocks_run"]
        else f"{about['blocks_run']} blocks were run, and the others of the {about['blocks']} extrapolated from a block's time; "
        "peaks include all weights"
    )
    lines += [
        "",
        f"Gains: against dense attention in the same run. Steps: random weights, one sample, transformer alone; {reckoned}.",
        f"Rates {rates}.",
    ]
    if found.file is not None:
        lines.append(f"Kept for flexclear explain: {found.file}")
    return "\n".join(lines)


def plot(found: Found, path: Path) -> Path:
    """Plot times of attention and of a step against image tokens, dense and by radius. Needs matplotlib."""
    from matplotlib.figure import Figure

    from flexclear.compile.files import whole_file

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    about = found.about
    figure.suptitle(
        f"{about['model']}, {about['heads']} heads x {about['head_dim']}, {about['dtype']}: {about['device']}",
        fontsize=10,
    )
    for number, (title, key) in enumerate((("attention, ms", "attention_ms"), ("step, s", "step_s"))):
        axes = figure.add_subplot(1, 2, number + 1)
        for radius in dict.fromkeys(row["r"] for row in found.rows):
            own = sorted((_image_tokens(row), row[key]) for row in found.rows if row["r"] == radius)
            label, style = ("dense", "ks-") if radius is None else (f"r = {radius}", "o-")
            axes.loglog([x for x, _ in own], [y for _, y in own], style, label=label)
        places = sorted({_image_tokens(row) for row in found.rows})
        axes.set_xticks(places, [f"{place:,}" for place in places])
        axes.minorticks_off()
        axes.set(xlabel="image tokens", ylabel=title)
        axes.legend(fontsize=8)
    with whole_file(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
    return path


def _image_tokens(row: dict[str, Any]) -> int:
    grid = row["tokens"].split(" + ")[0]
    height, width = grid.split(" x ")
    return int(height) * int(width)
