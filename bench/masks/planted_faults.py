"""How many planted faults the tests and the fuzzer find: plants each of ``faults.py`` in a copy of the project.

    python -m bench.masks.planted_faults [--only NAME ...] [--by tests|fuzz]

Before the faults, both run without one and must find nothing. A fault is caught if they fail within 60 seconds of processor
time, children included, on one thread: the time that an idle core would take. Random choices are seeded, so that scores repeat.
Runs are forked from this process, which has imported torch and never flexclear. Compiled attention is left out: it takes most
of the time and none of these faults needs it. Writes bench/results/planted_faults.{json,md} after every fault. With
``--only`` or ``--by``, other earlier results stay.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.masks.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
LIMIT = 60
"""Seconds of processor time."""

PATIENCE = 600
"""Seconds on the clock after which a run is given up: a busy machine is no fault."""

TESTS = ("tests/masks", "tests/parallel/test_planning.py", "tests/test_pooling.py")
COMPILED = "not prompts_cost_no_graph and not share_a_graph and not compiled"
ARGUMENTS = {
    "tests": ["-x", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-k", COMPILED, *TESTS],
    "fuzz": ["fuzz", "--masks-only", "--seed", "0"],
}
FAILED = {"tests": {1, 2}, "fuzz": {1}}
"""Exit statuses that say that something was found; pytest's 2 is an error while tests are collected."""

PRELOADED = (
    "PIL.Image",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.pipelines.flux.pipeline_flux",
    "hypothesis",
    "pytest",
    "rich.progress",
    "torch._inductor.codecache",
    "torch.nn.attention.flex_attention",
    "transformers",
    "typer",
)
"""What takes longest of what both import."""

forked = multiprocessing.get_context("fork")


def copy_of_project(folder: Path) -> Path:
    """The package and its tests, importable from ``folder``, with none of the benchmarks."""
    skipped = shutil.ignore_patterns("__pycache__", ".hypothesis", "*.pyc")
    for name in ("flexclear", "masks", "compile", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("masks", "compile"):  # packages that setuptools puts into flexclear
        if (folder / name).is_dir():
            (folder / "flexclear" / name).symlink_to(folder / name)
    return folder


def planted(fault: Fault, text: str) -> str:
    """``text`` with the fault.

    Raises:
        ValueError: the text to replace is not there exactly once.
    """
    count = text.count(fault.old)
    if count != 1:
        raise ValueError(
            f"fault {fault.name}: the text to replace is {count} times in {fault.file}, not once:\n{fault.old}"
        )
    return text.replace(fault.old, fault.new)


def start(by: str, folder: Path, output: Path, seconds: float) -> None:
    """What a forked process does: become the tests or the fuzzer of the project in ``folder``."""
    os.setsid()
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    if by == "tests":
        # The tests' own settings build on these: the first example is as good as the smallest here.
        hypothesis = importlib.import_module("hypothesis")
        phases = [
            phase for phase in hypothesis.Phase if phase not in (hypothesis.Phase.shrink, hypothesis.Phase.explain)
        ]
        hypothesis.settings.register_profile("unshrunk", phases=phases)
        hypothesis.settings.load_profile("unshrunk")
        sys.exit(int(importlib.import_module("pytest").main(ARGUMENTS[by])))
    importlib.import_module("flexclear.testing.fuzzing").SHRINKING = 0
    sys.argv = ["flexclear", *ARGUMENTS[by], "--seconds", str(seconds)]
    importlib.import_module("flexclear.cli").main()


def run(by: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Run the tests or the fuzzer in the copy; whether they failed, after how much processor time, and where."""
    output = folder / "output.txt"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = forked.Process(target=start, args=(by, folder, output, seconds))
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    failed, told = process.exitcode in FAILED[by], output.read_text()
    if not failed and process.exitcode > 0:
        raise RuntimeError(f"{by} did not run, exit status {process.exitcode}:\n{told[-3000:]}")
    return {"caught": failed and used <= LIMIT, "seconds": round(used, 1), "where": where(by, told) if failed else ""}


def where(by: str, output: str) -> str:
    """The failing test, or what the fuzzer printed first."""
    if by == "tests":
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return found[1].split("/")[-1].split("[")[0] if found else "?"
    lines = output[output.find("FAILURE") :].splitlines()[1:]
    return next((line.strip() for line in lines if line.strip()), "?")[:100].replace("|", "/")


def table(rows: dict[str, dict[str, Any]], ways: list[str]) -> str:
    """The score, and a row for each fault."""
    faults = [fault for fault in FAULTS if fault.name in rows]
    score = "; ".join(
        f"**by {by}: {sum(rows[fault.name][by]['caught'] for fault in faults if by in rows[fault.name])} of "
        f"{sum(by in rows[fault.name] for fault in faults)}**"
        for by in ways
    )
    head = "| fault | file | effect | " + " | ".join(f"{by}, s" for by in ways) + " | found by |"
    lines = [f"Caught within {LIMIT} s of processor time {score}", "", head, "|" + "---|" * (4 + len(ways))]
    for fault in faults:
        cells = [rows[fault.name].get(by) for by in ways]
        times = [
            "" if cell is None else f"{cell['seconds']:.0f}" if cell["caught"] else "**not found**" for cell in cells
        ]
        places = "; ".join(cell["where"] for cell in cells if cell and cell["caught"])
        lines.append(f"| {fault.name} | {fault.file} | {fault.effect} | {' | '.join(times)} | {places} |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, Any]], text: str, arguments: argparse.Namespace) -> None:
    """Write the results; in a process of its own, because ``machine`` imports flexclear."""
    machine, torch = importlib.import_module("bench.machine"), importlib.import_module("torch")
    about = machine.facts(torch.device("cpu"), seed=0, fuzz_seconds=arguments.seconds)
    machine.write_results("planted_faults", about, rows, text, arguments.out)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="a fault; repeat. Default: all")
    parser.add_argument("--by", choices=list(ARGUMENTS), help="default: both")
    parser.add_argument("--seconds", type=float, default=150, help="how long the fuzzer tries, on the clock (150)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    unknown = set(arguments.only or ()) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    chosen = [fault for fault in FAULTS if not arguments.only or fault.name in arguments.only]
    ways = [arguments.by] if arguments.by else list(ARGUMENTS)
    kept = arguments.out / "planted_faults.json"
    partial = arguments.only or arguments.by
    earlier = json.loads(kept.read_text())["rows"] if partial and kept.exists() else []
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    for name in PRELOADED:
        importlib.import_module(name)
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in earlier}
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_of_project(Path(temporary))
        sources = {fault.name: (folder / fault.file).read_text() for fault in chosen}
        broken = {fault.name: planted(fault, sources[fault.name]) for fault in chosen}
        for by in ways:
            sound = run(by, folder, arguments.seconds)
            print(f"without a fault, by {by}: {sound['seconds']} s {sound['where']}", flush=True)
            if sound["where"]:
                sys.exit(f"{by} fail without a fault: {sound['where']}")
        for fault in chosen:
            (folder / fault.file).write_text(broken[fault.name])
            found = {by: run(by, folder, arguments.seconds) for by in ways}
            (folder / fault.file).write_text(sources[fault.name])
            rows[fault.name] = {**rows.get(fault.name, {}), "name": fault.name, **found}
            told = ", ".join(
                f"{by} {'caught' if cell['caught'] else 'NOT'} {cell['seconds']} s" for by, cell in found.items()
            )
            print(f"{fault.name}: {told}", flush=True)
            shown = [by for by in ARGUMENTS if any(by in row for row in rows.values())]
            writing = forked.Process(target=write, args=(list(rows.values()), table(rows, shown), arguments))
            writing.start()
            writing.join()


if __name__ == "__main__":
    main()
