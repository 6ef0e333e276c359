"""Makes the cheap ones of the committed results again, and says where a committed figure is another.

    python -m bench.paper.check                 # make results-check; some minutes on two cores
    python -m bench.paper.check --only cost

What is counted must be equal. What is computed in floating point may differ as far as the order of sums reaches; what is timed
is compared as a ratio within one run, and only to be as large as said.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.machine import RESULTS, ROOT

OF_THE_RUN = ("hardware", "torch", "flexclear", "python", "diffusers", "commit", "date", "cache_hit_us")
"""Facts that say where a result was made, and not what was asked for."""


@dataclass(frozen=True)
class Check:
    """One committed result, and how to make it again.

    Attributes:
        name: for ``--only``.
        command: after the interpreter; ``{out}`` is a folder.
        result: committed file, in ``bench/results``.
        made: the new one, in the folder.
        bars: by key, how far a number may be off, in its own unit; of other keys, not at all.
        caps: by key, where a number is large enough: two beyond it are the same.
        ignored: keys that are not compared.
        ratios: by name, (what is computed of the contents, the smallest value).
    """

    name: str
    command: str
    result: str
    made: str
    bars: Mapping[str, float] = field(default_factory=dict)
    caps: Mapping[str, float] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    ratios: Mapping[str, tuple[Callable[[Any], float], float]] = field(default_factory=dict)


def _faster(content: Any) -> float:
    """How many times as fast as create_block_mask the block lists are made from boxes."""
    took = {row["kind"]: row["ms"] for row in content["rows"] if row["side"] == 64}
    return took["create_block_mask"] / took["boxes"]


def _perturbed(size: int) -> Check:
    return Check(
        f"perturb-{size}",
        "-m flexclear analyze perturb embedded --prompt 'a red apple on a blue background' "
        f"--size {size}x{size} --remote 8 --remote 12 --remote 16 --local 1 --local 2 --device cpu --out {{out}}",
        f"perturb-{size}/perturb.json",
        "perturb.json",
        # An image's 8-bit values that the order of sums rounds the other way: at 42 dB a thousandth of them is 0.02 dB.
        {"psnr": 0.1, "ssim": 1e-3},
        # A thousandth of an image's values one off: a clip that changes nothing gives 120 dB, or 95 if a single value rounds so.
        {"psnr": 78.1},
    )


# Attention of float32 after some steps of denoising: shares and distances are sums of thousands of weights, each off by some
# 1e-4 of itself. A rank counts singular values above a threshold, near which some lie.
MEASURED = {
    "mass_by_distance": 1e-3,
    "mean_distance": 0.02,
    "relative_distance": 2e-3,
    "text_share": 1e-3,
    "softmax_error": 1e-2,
    "numerical_rank": 2.0,
    "effective_rank": 0.5,
}

CHECKS = (
    Check(
        "cost",
        "-m flexclear analyze cost --results {results} --out {out}",
        "cost/cost.json",
        "cost.json",
        {"density": 1e-12, "amplification": 1e-12},
    ),
    Check("parallel_model", "-m bench.parallel.run --paper --out {out}", "parallel_model.json", "parallel_model.json"),
    Check("properties", "-m bench.attention.properties --output {out}", "properties.json", "properties.json", MEASURED),
    _perturbed(128),
    _perturbed(256),
    Check(
        "attention-maps",
        "-m flexclear analyze attention embedded --prompt 'a red apple on a blue background' --size 256x256 --query 8x8 "
        "--layer 2 --at 8 --device cpu --out {out}",
        "attention-maps/mass.json",
        "mass.json",
        {"mass": 1e-3, "text_share": 1e-3},
    ),
    Check(
        "blockmask",
        "-m bench.masks.blocks --sides 64 --out {out}",
        "blockmask-cpu.json",
        "blockmask-cpu.json",
        ignored=("ms", "first_ms", "peak_mb"),
        ratios={"times as fast as create_block_mask": (_faster, 20.0)},
    ),
    Check("clips", "-m bench.masks.clips --out {out}", "clips.json", "clips.json"),
)


def differences(committed: Any, made: Any, check: Check, where: str = "", key: str = "") -> Iterator[str]:
    """Where two contents are not the same, in words."""
    if key in check.ignored or (where.startswith("facts") and key in OF_THE_RUN):
        return
    if isinstance(committed, dict) and isinstance(made, dict):
        for name in dict.fromkeys([*committed, *made]):
            inside = f"{where}.{name}" if where else name
            if name in committed and name in made:
                own = key if key in check.bars and name not in check.bars else name
                yield from differences(committed[name], made[name], check, inside, own)
            elif name not in check.ignored and not (where == "facts" and name in OF_THE_RUN):
                yield f"{inside} is only in the {'committed' if name in committed else 'new'} result"
    elif isinstance(committed, list) and isinstance(made, list):
        if len(committed) != len(made):
            yield f"{where} has {len(committed)} entries, and {len(made)} now"
        for number, pair in enumerate(zip(committed, made, strict=False)):
            yield from differences(*pair, check, f"{where}[{number}]", key)
    elif _number(committed) and _number(made):
        bar, cap = check.bars.get(key, 0.0), check.caps.get(key, math.inf)
        if not abs(min(committed, cap) - min(made, cap)) <= bar:
            yield f"{where} is {committed}, and {made} now" + (f" (more than {bar:g} apart)" if bar else "")
    elif committed != made:
        yield f"{where} is {committed!r}, and {made!r} now"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def compared(committed: Any, made: Any, check: Check) -> list[str]:
    """What is wrong with a committed result, given the new one."""
    if check.name == "blockmask":  # The committed one has larger grids, too.
        sides = {row["side"] for row in made["rows"]}
        committed = {**committed, "rows": [row for row in committed["rows"] if row["side"] in sides]}
    wrong = list(differences(committed, made, check))
    for title, (ratio, least) in check.ratios.items():
        for whose, content in (("committed", committed), ("new", made)):
            if not (found := ratio(content)) >= least:
                wrong.append(f"{title}: {found:.1f} in the {whose} result, at least {least:g} expected")
    return wrong


def again(check: Check, folder: Path) -> Any:
    """The result made anew in a folder.

    Raises:
        RuntimeError: its command failed.
    """
    command = [part.format(out=folder, results=RESULTS) for part in shlex.split(check.command)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads((folder / check.made).read_text(encoding="utf-8"))


def main(
    only: Annotated[list[str] | None, typer.Option(help="Names of checks; repeat. Default: all.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the committed results.")] = RESULTS,
) -> None:
    """Make results again and compare; exit status 1 if one is another."""
    known = [check.name for check in CHECKS]
    if unknown := [name for name in only or () if name not in known]:
        raise typer.BadParameter(f"--only: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    failed = False
    for check in CHECKS:
        if only and check.name not in only:
            continue
        committed = json.loads((results / check.result).read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as folder:
            wrong = compared(committed, again(check, Path(folder)), check)
        typer.echo(f"{check.name}: {'as committed' if not wrong else f'{len(wrong)} differences'}")
        for line in wrong[:10]:
            typer.echo(f"  {check.result}: {line}")
        failed = failed or bool(wrong)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
