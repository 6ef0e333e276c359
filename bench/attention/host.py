"""Time of the host per attention layer: a transformed model less the plain one, where the device has next to nothing to do.

    python -m bench.attention.host                                  # this checkout
    python -m bench.attention.host --against ../flexclear-before    # and another, with an environment of its own, by turns

One thread, the 19 + 38 layers of FLUX.1 with few channels, 4 x 4 image tokens. Each process times the two models by turns and
reports the lower quartile; processes of the two checkouts alternate, and the median of the differences is shown. ``compiled``:
both models' blocks are, the plain one's by diffusers' ``compile_repeated_blocks``; a second round, with a clock around each
piece, says where the difference goes. Writes bench/results/host.{json,md}, of this checkout.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

HERE = Path(__file__).resolve().parents[2]
WAYS = {"sdpa": "eager, masked SDPA", "flex": "eager, FlexAttention", "compiled": "compiled blocks, FlexAttention"}
LAYERS = (19, 38)
ROUNDS = 40
PARTS = {
    "call": "entry, exit and what runs between blocks",
    "block": "a block's hooks, and its arguments made ready",
    "dynamo": "Dynamo: guards, entry of the graph",
    "graph": "the graph itself: kernels and the code between them",
}


def measure(way: str) -> dict[str, float]:
    """Microseconds per layer of the plain model, and of what ``transform`` adds, in one of ``WAYS``."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    import flexclear

    torch.set_num_threads(1)

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            in_channels=8, num_layers=LAYERS[0], num_single_layers=LAYERS[1], attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
        ).eval()  # fmt: skip

    call = {
        "hidden_states": torch.randn(1, 16, 8),
        "encoder_hidden_states": torch.randn(1, 4, 12),
        "pooled_projections": torch.randn(1, 12),
        "timestep": torch.tensor([0.5]),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
        "txt_ids": torch.zeros(4, 3),
    }
    compiled = way == "compiled"
    models = {"plain": model(), "transformed": flexclear.transform(model(), r=2, backend="flex" if compiled else way)}
    if compiled:
        models["plain"].compile_repeated_blocks(fullgraph=True)
        flexclear.optimize(models["transformed"])
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for each in models.values():
            each(**call), each(**call)
        for _ in range(ROUNDS):
            for name, each in models.items():
                start = time.perf_counter()
                each(**call)
                times[name].append(time.perf_counter() - start)
    plain, ours = (lower_quartile(times[name]) for name in models)
    found = {"plain": plain, "added": ours - plain}
    if compiled:
        parts = {name: where_it_goes(each, call) for name, each in models.items()}
        found |= {part: parts["transformed"][part] - parts["plain"][part] for part in PARTS}
    return found


def lower_quartile(seconds: list[float]) -> float:
    """Of the times of calls, in microseconds per layer."""
    return statistics.quantiles(seconds, n=4)[0] / sum(LAYERS) * 1e6


def where_it_goes(model: torch.nn.Module, call: dict[str, Any]) -> dict[str, float]:
    """Microseconds per layer in each of ``PARTS`` of a model with compiled blocks."""
    from torch._inductor.output_code import CompiledFxGraph

    from flexclear.compile.blocks import repeated_blocks
    from flexclear.compile.compiled import CompiledForward

    spent: dict[str, float] = {}

    def clocked(kind: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[kind] = spent.get(kind, 0.0) + time.perf_counter() - start

        return timed

    for block in repeated_blocks(model):
        forward = vars(block).get("forward")
        inner = block._compiled_call_impl
        if isinstance(forward, CompiledForward):
            forward._compiled = clocked("compiled", forward._compiled)
        else:
            inner = clocked("compiled", inner)
        block._compiled_call_impl = clocked("block", inner)
    with mock.patch.object(CompiledFxGraph, "__call__", clocked("graph", CompiledFxGraph.__call__)), torch.no_grad():
        rounds: dict[str, list[float]] = {kind: [] for kind in ("all", "block", "compiled", "graph")}
        for _ in range(ROUNDS):
            spent.clear()
            start = time.perf_counter()
            model(**call)
            spent["all"] = time.perf_counter() - start
            for kind, seconds in rounds.items():
                seconds.append(spent[kind])
    whole, block, compiled, graph = (lower_quartile(rounds[kind]) for kind in ("all", "block", "compiled", "graph"))
    return {"call": whole - block, "block": block - compiled, "dynamo": compiled - graph, "graph": graph}


def python_of(root: Path) -> Path:
    """The interpreter of a checkout's own environment."""
    return Path(sys.executable) if root == HERE else root / ".venv" / "bin" / "python"


def in_checkout(root: Path, way: str) -> dict[str, float]:
    """``measure`` in a process of a checkout's own environment, its ``.venv``."""
    command = [str(python_of(root)), __file__, "--worker", way]
    found = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, check=True
    )
    return json.loads(found.stdout.splitlines()[-1])


def main(
    against: Annotated[Path | None, typer.Option(help="Another checkout.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print what one layer costs the host, and what a window adds to it."""
    if worker is not None:
        print(json.dumps(measure(worker)))
        return
    from bench.machine import RESULTS, facts, write_results  # not in a worker, which is this file alone

    roots = {"this checkout": HERE, **({} if against is None else {str(against): against.resolve()})}
    if missing := [str(python_of(root)) for root in roots.values() if not python_of(root).is_file()]:
        raise typer.BadParameter(f"--against needs a checkout with an environment; there is no {missing[0]}")
    rows = []
    for way, described in WAYS.items():
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
        for _ in range(repeats):
            for name, root in roots.items():
                runs[name].append(in_checkout(root, way))
        for name, found in runs.items():
            medians = {what: statistics.median(run[what] for run in found) for what in found[0]}
            plain, added = medians["plain"], medians["added"]
            print(
                f"{described}, {name}: {added:.0f} us added to {plain:.0f} us of the plain layer (median of {repeats})"
            )
            if roots[name] == HERE:
                parts = {part: medians[part] for part in PARTS if part in medians}
                rows.append({"way": described, "plain_us": plain, "added_us": added, "parts_us": parts})
    lines = [
        "What a window adds to the host's time per layer of FLUX.1, in microseconds.",
        "",
        "| | plain layer | added |",
        "|---|---|---|",
        *(f"| {row['way']} | {row['plain_us']:.0f} | {row['added_us']:.0f} |" for row in rows),
        "",
        "What is added to compiled blocks, with a clock around each piece:",
        "",
        *(f"- {PARTS[part]}: {value:.0f}" for row in rows for part, value in row["parts_us"].items()),
    ]
    about = facts(torch.device("cpu"), threads=1, layers=sum(LAYERS), repeats=repeats)
    write_results("host", about, rows, "\n".join(lines) + "\n", RESULTS)


if __name__ == "__main__":
    typer.run(main)
