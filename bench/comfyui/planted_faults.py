"""How many planted faults the ComfyUI node's tests find: plants each of ``faults.py`` in a copy of the project.

    make comfyui
    python -m bench.comfyui.planted_faults [--only NAME ...]

The tests are those that the suite runs, ``tests/comfyui/test_node.py``. Without a fault they must pass. Writes
bench/results/comfyui_faults.{json,md} after every fault; with ``--only``, other earlier results stay.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.comfyui.faults import FAULTS
from bench.machine import RESULTS, ROOT, facts, write_results
from bench.masks.planted_faults import copy_of_project, planted

NAME = "comfyui_faults"
TESTS = "tests/comfyui/test_node.py"


def main(
    only: Annotated[list[str] | None, typer.Option(help="a fault; repeatable. Default: all")] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Plant faults in the node, and write a table of what finds them."""
    unknown = set(only or ()) - {fault.name for fault in FAULTS}
    if unknown:
        raise typer.BadParameter(f"no such fault: {', '.join(sorted(unknown))}")
    kept = out / f"{NAME}.json"
    rows: dict[str, dict[str, Any]] = {}
    if only and kept.exists():
        rows = {row["name"]: row for row in json.loads(kept.read_text())["rows"]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_of_project(Path(temporary))
        shutil.copytree(ROOT / "comfyui", folder / "comfyui", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / ".venv").symlink_to(ROOT / ".venv")
        sound = run(folder)
        typer.echo(f"without a fault: {sound['seconds']} s")
        if sound["found_by"]:
            raise SystemExit(f"the tests fail without a fault: {sound['found_by']}")
        for fault in FAULTS:
            if only and fault.name not in only:
                continue
            text = (folder / fault.file).read_text()
            (folder / fault.file).write_text(planted(fault, text))
            found = run(folder)
            (folder / fault.file).write_text(text)
            typer.echo(f"{fault.name}: {found['found_by'] or 'NOT FOUND'}, {found['seconds']} s")
            rows[fault.name] = {"name": fault.name, **found}
            write_results(NAME, facts(torch.device("cpu")), list(rows.values()), table(rows), out)


def run(folder: Path) -> dict[str, Any]:
    """The test that fails first in the copy, and how many fail; the processor time until then."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", TESTS],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "CI": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"the tests did not run, exit status {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    first = re.search(r"^(?:FAILED|ERROR) \S*::(\S+(?: [^-\s][^-]*\])?)", done.stdout, re.MULTILINE)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"found_by": first[1] if first and done.returncode else "", "seconds": round(used, 1)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The score, and a row for each fault."""
    faults = [fault for fault in FAULTS if fault.name in rows]
    found = sum(bool(rows[fault.name]["found_by"]) for fault in faults)
    lines = [
        f"Found by `{TESTS}` as the suite runs it: **{found} of {len(faults)}**",
        "",
        "| fault | file | effect | found by | processor time, s |",
        "|---|---|---|---|---|",
    ]
    for fault in faults:
        row = rows[fault.name]
        lines.append(
            f"| {fault.name} | {fault.file} | {fault.effect} | {row['found_by'] or '**not found**'} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
