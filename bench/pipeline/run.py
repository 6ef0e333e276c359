"""A whole picture's denoising loop at the real configuration: dense, raster order (the paper's way), flexclear, FP8.

    python -m bench.pipeline.run --model flux.1-dev                                  # one CUDA device of 40 GB or more
    python -m bench.pipeline.run --model flux-reduced                                # two CPU cores
    python -m bench.pipeline.run --model flux.1-dev --sizes 4096 8192 --radii 8 --append  # some rows anew, the others kept

Speed does not depend on the values of weights and text, so both are made up; text encoders and VAE are left out. Every
variant is checked against the dense-masked model in the same run. Results go to bench/results/ after every row: JSON,
Markdown, and a plot with the paper's published curve.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.machine import RESULTS, facts, write_results
from bench.pipeline.models import MODELS
from bench.pipeline.report import add_speedups, plot, table
from bench.pipeline.rows import Settings, measure
from bench.pipeline.variants import VARIANTS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def save(name: str, about: dict[str, Any], rows: list[dict[str, Any]], out: Path) -> str:
    """Write JSON, Markdown and plot; returns the table."""
    add_speedups(rows)
    text = table(rows, about["steps"])
    write_results(name, about, rows, text, out)
    plot(rows, f"{about['model']}, {about['hardware']}: speed-up over the compiled dense model").save(
        out / f"{name}.png"
    )
    return text


def earlier(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run under the same conditions.

    Raises:
        ValueError: the file is of other conditions.
    """
    if not path.is_file():
        return []
    content = json.loads(path.read_text())
    changed = [key for key, value in about.items() if content["facts"].get(key) != value]
    if changed:
        raise ValueError(f"--append: {path} was measured with another {', '.join(changed)}; move it away first")
    return content["rows"]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is about."""
    return row["variant"], row["r"], row["px"]


def spread(arguments: Sequence[str]) -> list[str]:
    """``--sizes 1024 2048`` as ``--sizes 1024 --sizes 2048``; the same for ``--radii``."""
    found: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in ("--sizes", "--radii") else None
        elif option is not None and found[-1] != option:
            found.append(option)
        found.append(argument)
    return found


def main(
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(name for name in MODELS if not name.startswith('tiny'))}.")
    ],
    weights: Annotated[
        str | None, typer.Option(help="random, or trained (embedded only). Default: trained for embedded.")
    ] = None,
    sizes: Annotated[list[int] | None, typer.Option(min=1, help="Sides in pixels, such as 1024 2048.")] = None,
    radii: Annotated[list[int] | None, typer.Option(min=1, help="Window radii in tokens, such as 8 16.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(VARIANTS)}; repeat. Default: all.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    budget: Annotated[float, typer.Option(help="Seconds per row; fewer steps are timed where all take longer.")] = 120,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    mode: Annotated[str, typer.Option(help="torch.compile's mode.")] = "default",
    backend: Annotated[str, typer.Option(help="Of flexclear.transform.")] = "auto",
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Compile nothing, for a quick look.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Keep rows of earlier runs that are not run anew.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure and write bench/results/pipeline-<model>-<cpu|cuda>.{json,md,png}. Exit status 1 if a variant is wrong."""
    if model not in MODELS:
        raise typer.BadParameter(f"--model must be one of {list(MODELS)}, got {model!r}")
    unknown = [name for name in variant or () if name not in VARIANTS]
    if unknown or dtype not in DTYPES or weights not in (None, "random", "trained"):
        raise typer.BadParameter(
            f"--variant takes {list(VARIANTS)}, --dtype {list(DTYPES)}, --weights random or trained; "
            f"got {unknown or ''} {dtype!r} {weights!r}"
        )
    chosen = MODELS[model]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(
        model=chosen,
        sizes=tuple(sorted(set(sizes or chosen.sizes))),
        radii=tuple(sorted(set(radii or chosen.radii))),
        variants=tuple(v for v in VARIANTS.values() if not variant or v.name in variant),
        steps=steps,
        budget=budget,
        device=device,
        dtype=DTYPES[dtype],
        trained=(weights or ("trained" if chosen.config is None else "random")) == "trained",
        compiled=not no_compile,
        mode=mode,
        backend=backend,
    )
    name = f"pipeline-{model}-{device.type}"
    about = facts(
        device,
        model=model,
        weights="trained" if settings.trained else "random",
        dtype=dtype,
        steps=steps,
        budget_s=budget,
        mode=mode if settings.compiled else "not compiled",
        batch=chosen.batch,
    )
    rows = earlier(out / f"{name}.json", about) if append else []
    text = ""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with torch.no_grad(), Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=settings.runs)
        for row in measure(settings):
            rows = [old for old in rows if key(old) != key(row)] + [row]
            text = save(name, about, rows, out)
            progress.update(task, advance=1, description=f"{row['variant']}, r {row['r']}, {row['px']} px")
    print(text)
    wrong = [row for row in rows if row["wrong"]]
    for row in wrong:
        print(f"WRONG: {row['variant']}, r = {row['r']}: relative error {row['error']:.1e} to the dense-masked model")
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.argv[1:] = spread(sys.argv[1:])
    typer.run(main)
