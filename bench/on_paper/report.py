"""Tables and faults of what ``on_paper.py`` has found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

GB = 1e9
CARDS = (24, 48, 80)
"""GB of memory of the cards that are asked for."""

OUTSIDE = 1.0
"""GB that are not counted: CUDA's context (about 0.5), cuBLAS's workspaces, what the allocator splits."""

COPIES = 7
"""Times the largest linear that quantizing it may take besides: itself in bfloat16, and in float32 as it is, scaled and
clamped. A model whose largest linears come last has all else there already."""

FIRST_READING = {
    1024: (24.3, 24.1, 15.5),
    4096: (31.2, 28.4, 18.7),
    8192: (53.2, 41.9, 29.2),
    16384: (None, 96.0, 71.2),
}
"""Peaks of FLUX.1-dev in GB, eager, compiled and compiled in FP8, by a prototype of this study."""

WAYS = ("eager", "compiled", "compiled, FP8 by rows", "compiled, FP8 by tensors")


def way(job: Row) -> str:
    """Which of ``WAYS`` a job is."""
    if job["precision"] == "bfloat16":
        return WAYS[1] if job["compiled"] else WAYS[0]
    return WAYS[2] if job["precision"] == "rowwise" else WAYS[3]


def kinds_of_blocks(model: str) -> int:
    """Graphs that a size needs: one for each kind of block."""
    return 1 if model.startswith("Qwen") else 2


def faults(rows: Iterable[Row]) -> list[str]:
    """What is not as it must be, in words."""
    found, quantized = [], {}
    for row in rows:
        job, what = row["job"], row["what"]
        where = f"{job['model']}, {way(job)}, {row.get('pixels', '')} px, {what}: "
        if what == "failed":
            found.append(where + row["reason"])
        elif what == "loaded":
            quantized[str(job)] = row["quantized"]
            if job["from_cpu"] and row["peak"] > row["weights"] + COPIES * row["largest"]:
                found.append(where + f"{row['peak'] / GB:.1f} GB at a time for {row['weights'] / GB:.1f} GB")
        elif "graphs" in row and "pixels" in row:
            found += [where + text for text in _wrong(job, row, quantized.get(str(job), 0))]
        elif row["fallbacks"]:
            found.append(where + f"operators that are not fused: {row['fallbacks']}")
    return found


def _wrong(job: Row, row: Row, quantized: int) -> list[str]:
    found, new = [], row["what"] == "first"
    may_compile = job["compiled"] and (new or row["what"] == "LoRA loaded")
    most = kinds_of_blocks(job["model"]) if may_compile else 0 if job["compiled"] else None
    if most is not None and row["graphs"] > most:
        found.append(f"{row['graphs']} graphs, at most {most} are needed: {row['causes']}")
    if len(row["readings"]) > (1 if new else 0):
        found.append(f"reads values on the GPU: {row['readings']}")
    if row["transfers"] and not new:
        found.append(f"copies between CPU and GPU: {row['transfers']}")
    products = row["products"].get("_scaled_mm", 0)
    if job["compiled"] and products != quantized:
        found.append(f"{products} FP8 products for {quantized} quantized linears")
    return found


def report(rows: list[Row], versions: dict[str, str]) -> str:
    """The tables in Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in versions.items())
    parts = [
        "# Whole models on a GPU that is not there\n",
        f"`python -m bench.on_paper.run`; {about}. **Computed, not measured**: fake tensors, generated code run with kernels "
        "that do nothing. One image, 512 text tokens, r = 16, the transformer alone, second call of a size. Peaks are bytes of "
        f"live storages, each rounded up to 512, without CUDA context, workspaces and fragmentation (about {OUTSIDE:g} GB).\n",
        "## Peak memory of a step, GB\n",
        _peaks(rows),
        "## Largest square image by memory of the card, px\n",
        f"Of those above; peak and {OUTSIDE:g} GB within the card's memory, everything else of the pipeline off it.\n",
        _cards(rows),
        "## Quantizing\n",
        _quantizing(rows),
        "## What a call does\n",
        "Readings: values on the GPU that the host waits for; copies: tensors that are put on the GPU. Both in a size's first "
        "call; in every other call there are none. Graphs of a size's first call, again: of its second, of the first size after "
        "the others, and after one LoRA is exchanged for another.\n",
        _calls(rows),
        "## Beside the first reading, FLUX.1-dev, GB\n",
        _beside(rows),
    ]
    wrong = faults(rows)
    parts += ["## Faults\n", "\n".join(f"- {line}" for line in wrong) if wrong else "None.", ""]
    return "\n".join(parts)


def _peak(rows: list[Row], model: str, name: str, pixels: int) -> float | None:
    return next(
        (
            row["peak"] / GB
            for row in rows
            if row["what"] == "second"
            and row["job"]["model"] == model
            and way(row["job"]) == name
            and row["pixels"] == pixels
        ),
        None,
    )


def _models(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["job"]["model"] for row in rows))


def _sizes(rows: list[Row], model: str | None = None) -> list[int]:
    return sorted({row["pixels"] for row in rows if "pixels" in row and model in (None, row["job"]["model"])})


def _table(head: Iterable[Any], lines: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    written = [head, ["---", *["---:"] * (len(head) - 1)], *map(list, lines)]
    return "\n".join("| " + " | ".join(map(_text, line)) + " |" for line in written) + "\n"


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def _peaks(rows: list[Row]) -> str:
    sizes = _sizes(rows)
    lines = [
        [f"{model}, {name}", *(_peak(rows, model, name, size) for size in sizes)]
        for model in _models(rows)
        for name in WAYS[:3]
    ]
    return _table(["", *(f"{size} px" for size in sizes)], lines)


def _cards(rows: list[Row]) -> str:
    def largest(model: str, name: str, card: int) -> str | None:
        known = {size: _peak(rows, model, name, size) for size in _sizes(rows, model)}
        peaks = {size: peak for size, peak in known.items() if peak is not None}
        fits = [size for size, peak in peaks.items() if peak + OUTSIDE <= card]
        return str(max(fits)) if fits else "none" if peaks else None

    lines = [
        [f"{model}, {name}", *(largest(model, name, card) for card in CARDS)]
        for model in _models(rows)
        for name in WAYS[:3]
    ]
    return _table(["", *(f"{card} GB" for card in CARDS)], lines)


def _quantizing(rows: list[Row]) -> str:
    loaded = [row for row in rows if row["what"] == "loaded" and row["quantized"]]
    lines = [
        [
            f"{row['job']['model']}, {row['job']['precision']}",
            "CPU" if row["job"]["from_cpu"] else "GPU",
            row["quantized"],
            row["weights"] / GB,
            row["peak"] / GB,
        ]
        for row in loaded
    ]
    return _table(["", "original weights on the", "linears", "result, GB", "peak on the GPU, GB"], lines)


def _calls(rows: list[Row]) -> str:
    lines = []
    for job in {str(row["job"]): row["job"] for row in rows}.values():
        own = [row for row in rows if row["job"] == job and "pixels" in row]
        first = [row for row in own if row["what"] == "first"]
        others = [row["graphs"] for row in own if row["what"] in ("second", "back")]
        swapped = [row["graphs"] for row in own if row["what"] == "LoRA swapped"]
        if not first:
            continue
        products = {name: count for name, count in first[-1]["products"].items() if name == "_scaled_mm"}
        quantized = next((row["quantized"] for row in rows if row["job"] == job and row["what"] == "loaded"), 0)
        lines.append(
            [
                f"{job['model']}, {way(job)}",
                max(len(row["readings"]) for row in first),
                max(len(row["transfers"]) for row in first),
                "/".join(str(row["graphs"]) for row in first),
                sum(others),
                swapped[0] if swapped else None,
                first[-1]["launches"],
                f"{products.get('_scaled_mm', 0)} of {quantized}" if quantized else None,
            ]
        )
    head = [
        "",
        "readings",
        "copies",
        "graphs by size",
        "again",
        "LoRA swap",
        "Triton launches",
        "FP8 products of linears",
    ]
    return _table(head, lines)


def _beside(rows: list[Row]) -> str:
    lines = []
    for pixels, expected in FIRST_READING.items():
        cells: list[Any] = [pixels]
        for name, number in zip(WAYS, expected, strict=False):
            cells += [number, _peak(rows, "FLUX.1-dev", name, pixels)]
        lines.append(cells)
    return _table(["px", "eager", "here", "compiled", "here", "FP8", "here"], lines)
