"""Rows and tables of bench/kernels/run.py, and what of them is a fault."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.kernels.cases import CHECKPOINTS, HALF, INTERPRETED_FOR, Capability, Job, jobs
from bench.machine import facts, write_results
from fakegpu.cases import Case
from fakegpu.device import GPUS

Row = dict[str, Any]

NAME = "kernels"
LARGEST_ERROR = 1e-5
"""Of float32, absolute, as ``flexclear.testing`` asks."""

UNEVEN = "IS_DIVISIBLE=False"
"""The option that is chosen by itself where lengths do not divide."""

ABOUT_CLIPS = """Clips of 16 x 16 x 16 tokens and 512 of text, as many as the image has; where lengths do not divide, 21 x 24 x 40
and no text, as of Wan. `cylinder`, `all_frames` and `ball` are one kernel, whose numbers are tensors."""

PASSES = {"forward": "forward", "lse": "forward with LSE", "backward": "backward"}


def key_of(job: Job) -> str:
    """What a row is found by, also by what has more kinds of cases than when it was made."""
    return _key(job.section, job.capability, job.case)


def _key(section: str, capability: Capability, case: Case) -> str:
    plain = Case().to_json()
    return f"{section} {capability} { {name: value for name, value in case.to_json().items() if value != plain[name]} }"


def row_of(job: Job, result: Row) -> Row:
    """What is kept of a result."""
    return {"section": job.section, "name": job.name, **result}


def read_rows(out: Path) -> dict[str, Row]:
    """Earlier rows of cases that there still are, by their keys."""
    file, keys = out / f"{NAME}.json", set(map(key_of, jobs()))
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    found = {_key(row["section"], tuple(row["capability"]), Case.from_json(row["case"])): row for row in rows}
    return {key: row for key, row in found.items() if key in keys}


def write(rows: dict[str, Row], out: Path) -> None:
    """Write rows and tables."""
    about = facts(torch.device("cpu"), triton=version("triton"), hardware="none: compiled, not run")
    write_results(NAME, about, list(rows.values()), tables(rows.values()), out)


def faults(rows: Iterable[Row]) -> list[str]:
    """What may not be: refusals, too much shared memory, spills where none are allowed, wrong results."""
    found = []
    for row in rows:
        name = _name(row)
        if row["status"] == "refused":
            found.append(f"{name}: refused: {row['reason']}")
        for what, error in row.get("errors", {}).items():
            if not error <= LARGEST_ERROR:
                found.append(f"{name}: {what} is off by {error:.1e}")
        for kernel in row.get("kernels", ()):
            which = f"{name}, {PASSES[kernel['kind']]}"
            allowed = GPUS[tuple(row["capability"])][2]
            if kernel["shared"] > allowed:
                found.append(f"{which}: {kernel['shared']} bytes of shared memory, the GPU has {allowed}")
            if may_not_spill(row, kernel) and kernel["spill_stores"] + kernel["spill_loads"]:
                found.append(f"{which}: spills {kernel['spill_stores']} bytes, loads {kernel['spill_loads']}")
    return found


def may_not_spill(row: Row, kernel: Row) -> bool:
    """Half precision forward to head dim 128 on the GPUs that most have, as flexclear chooses it for any lengths."""
    case = row["case"]
    half = case["dtype"] in HALF and case["head_dim"] <= 128 and row["capability"] in ([8, 9], [9, 0])
    return half and kernel["kind"] != "backward" and (row["section"] != "options" or row["name"] == UNEVEN)


def tables(rows: Iterable[Row]) -> str:
    """All tables as Markdown."""
    by_section: dict[str, list[Row]] = {}
    for row in rows:
        by_section.setdefault(row["section"], []).append(row)
    parts = [_summary(by_section)]
    if "interpreter" in by_section:
        parts.append(_interpreted(by_section["interpreter"]))
    heads = "\n".join(f"- {head_dim}: {models}" for head_dim, models in CHECKPOINTS.items())
    for section, title in (
        ("attention", f"Attention as flexclear chooses it\n\nHead dims of published checkpoints:\n\n{heads}"),
        ("every", "What is left of head dims 32 to 128"),
        ("clips", f"Several frames beside an image\n\n{ABOUT_CLIPS}"),
        ("options", "Options that a caller may choose, for inference in bfloat16"),
    ):
        if section in by_section:
            parts.append(f"## {title}\n\n{_compiled(by_section[section])}")
    return "\n\n".join(parts) + "\n"


def _summary(by_section: dict[str, list[Row]]) -> str:
    rows = [row for section in by_section.values() for row in section]
    kernels = [(row, kernel) for row in rows for kernel in row.get("kernels", ())]
    spilling = sum(kernel["spill_stores"] + kernel["spill_loads"] > 0 for _, kernel in kernels)
    strict = [kernel for row, kernel in kernels if may_not_spill(row, kernel)]
    spilling_strictly = sum(kernel["spill_stores"] + kernel["spill_loads"] > 0 for kernel in strict)
    found, missing = faults(rows), Counter(f"{job.section}, {job.name}, {job.case.dtype}" for job in jobs())
    missing.subtract(f"{row['section']}, {row['name']}, {row['case']['dtype']}" for row in rows)
    left = [f"{name} ({count})" for name, count in missing.items() if count > 0]
    lines = [
        f"{len(rows)} cases, {len(kernels)} kernels compiled, {sum(row['status'] == 'refused' for row in rows)} cases refused. "
        f"{spilling} kernels spill registers; of the {len(strict)} that may not (bfloat16 and float16 forward, head dim to 128, "
        f"sm_89 and sm_90) {spilling_strictly}.",
        "Mask unless named otherwise: 64 x 64 image tokens, 512 of text, r = 16. Loops: SASS instructions of one turn of the "
        "innermost loops, over partial blocks and over full ones; backward has two of each, for queries and for keys.",
    ]
    if left:
        lines.append(
            f"Cases that are not measured yet; `python -m bench.kernels.run` measures them: {'; '.join(left)}."
        )
    if found:
        lines += ["Faults:", "\n".join(f"- {fault}" for fault in found)]
    return "\n\n".join(lines)


def _interpreted(rows: list[Row]) -> str:
    pieces = ("output", "lse", "query", "key", "value")
    gpu = "sm_{}{}".format(*INTERPRETED_FOR)
    lines = [
        f"## Generated code for {gpu} in Triton's interpreter, float32, against masked SDPA\n",
        "Greatest absolute errors; the last column is how far attention without a mask is from it.\n",
        "| layout | head dim | queries x keys | output | LSE | grad query | grad key | grad value | unmasked |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = [f"{row['errors'][piece]:.1e}" if piece in row["errors"] else "" for piece in pieces]
        tokens = " x ".join(map(str, row["tokens"]))
        cells = [row["name"], row["case"]["head_dim"], tokens, *errors, f"{row['unmasked']:.1g}"]
        lines.append(_line(cells))
    return "\n".join(lines)


def _compiled(rows: list[Row]) -> str:
    columns = ("GPU", "head dim", "dtype", "mask or options", "pass", "blocks", "tile", "warps", "stages", "registers")
    columns += ("spills (B)", "shared (KB)", "partial loop", "full loop", "products")
    lines = [_line(columns), "|---" * len(columns) + "|"]
    for row in sorted(rows, key=_place):
        case = row["case"]
        start = [f"sm_{row['capability'][0]}{row['capability'][1]}", case["head_dim"], case["dtype"], row["name"]]
        lines += [_line([*start, *_cells(kernel)]) for kernel in row["kernels"]]
        if row["status"] == "refused":
            lines.append(_line([*start, f"refused: {row['reason'][:120]}", *[""] * (len(columns) - 5)]))
        if row.get("generated"):
            lines.append(_line([*start, f"generated, not compiled: {row['generated']}", *[""] * (len(columns) - 5)]))
        if row.get("compiled"):
            lines.append(_line([*start, f"compiled by {row['by']}", *[""] * (len(columns) - 5)]))
    return "\n".join(lines)


def _cells(kernel: Row) -> list[Any]:
    constants, loops = kernel["constants"], [loop["instructions"] for loop in kernel["loops"]]
    names = ("BLOCK_M", "BLOCK_N") if "BLOCK_M" in constants else ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    products = next((name for name in ("wgmma", "tcgen05", "mma") if kernel[name]), "FMA")
    return [
        PASSES[kernel["kind"]],
        f"{constants['SPARSE_Q_BLOCK_SIZE']} x {constants['SPARSE_KV_BLOCK_SIZE']}",
        " x ".join(str(constants[name]) for name in names),
        kernel["warps"],
        kernel["stages"],
        kernel["registers"],
        f"{kernel['spill_stores']} / {kernel['spill_loads']}",
        f"{kernel['shared'] / 1024:.1f}",
        " + ".join(map(str, loops[0::2])),
        " + ".join(map(str, loops[1::2])),
        f"{products}, TMA" if kernel["tma"] else products,
    ]


def _place(row: Row) -> tuple[Any, ...]:
    case = row["case"]
    return (row["capability"], case["head_dim"], case["dtype"], row["name"], case["backward"])


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _name(row: Row) -> str:
    case = row["case"]
    gpu = "sm_{}{}".format(*row["capability"])
    return f"{row['section']}, {gpu}, head dim {case['head_dim']}, {case['dtype']}, {row['name']}"
