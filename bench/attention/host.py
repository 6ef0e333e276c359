"""Time of the host per attention layer: a transformed model less the plain one, where the device has next to nothing to do.

    python -m bench.attention.host                                  # this checkout
    python -m bench.attention.host --against ../flexclear-before    # and another, with an environment of its own, by turns

One thread, 16 layers of FLUX.1's classes, 4 x 4 image tokens. Each process times the two models by turns and reports the lower
quartile; processes of the two checkouts alternate, and the median of the differences is shown. ``compiled``: both models' blocks
are, the plain one's by diffusers' ``compile_repeated_blocks``. Writes bench/results/host.{json,md}, of this checkout.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

HERE = Path(__file__).resolve().parents[2]
WAYS = {"sdpa": "eager, masked SDPA", "flex": "eager, FlexAttention", "compiled": "compiled blocks, FlexAttention"}
LAYERS = (6, 10)
ROUNDS = 60


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
    plain, ours = (statistics.quantiles(times[name], n=4)[0] / sum(LAYERS) * 1e6 for name in models)
    return {"plain": plain, "added": ours - plain}


def in_checkout(root: Path, way: str) -> dict[str, float]:
    """``measure`` in a process of a checkout's own environment, its ``.venv``."""
    own = sys.executable if root == HERE else str(root / ".venv" / "bin" / "python")
    command = [own, __file__, "--worker", way]
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
    rows = []
    for way, described in WAYS.items():
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
        for _ in range(repeats):
            for name, root in roots.items():
                runs[name].append(in_checkout(root, way))
        for name, found in runs.items():
            plain, added = (statistics.median(run[what] for run in found) for what in ("plain", "added"))
            print(
                f"{described}, {name}: {added:.0f} us added to {plain:.0f} us of the plain layer (median of {repeats})"
            )
            if roots[name] == HERE:
                rows.append({"way": described, "plain_us": plain, "added_us": added})
    lines = [
        "What a window adds to the host's time per layer of FLUX.1, in microseconds.",
        "",
        "| | plain layer | added |",
        "|---|---|---|",
        *(f"| {row['way']} | {row['plain_us']:.0f} | {row['added_us']:.0f} |" for row in rows),
    ]
    about = facts(torch.device("cpu"), threads=1, layers=sum(LAYERS), repeats=repeats)
    write_results("host", about, rows, "\n".join(lines) + "\n", RESULTS)


if __name__ == "__main__":
    typer.run(main)
