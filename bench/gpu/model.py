"""A FLUX.1-shaped transformer with random weights on a GPU: a step at 1024 to 8192 px, its peak memory, and warm starts.

    python -m bench.gpu.model rows.jsonl --limit 180
    python -m bench.gpu.model rows.jsonl --warm artifacts.bin     # the first step of another process
    python -m bench.gpu.model rows.jsonl --tiny                   # a trial of the program itself, on any machine

Rows are written as they are measured. One set of graphs serves all sizes (``dynamic=True``): a set a size would take the
whole time to compile. Dense attention at the largest size is measured on one block of each kind, and marked so.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FluxTransformer2DModel
from torch import nn

import flexclear
from flexclear.compile import save_artifacts, weight_bytes
from flexclear.optimization import artifact_configuration

from bench.gpu.attention import timer
from bench.gpu.rows import Clock, Rows

FLUX = {"guidance_embeds": True, "num_layers": 19, "num_single_layers": 38}
FLUX_HEADS = 24
TINY = {
    **FLUX,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
}
WAYS: dict[str, dict[str, Any]] = {"r = 16": {"r": 16}, "r = 16, FP8": {"r": 16, "fp8": True}, "dense": {}}
"""By importance. Other radii are the same graphs: ``OTHER_R`` is measured on the first way's model."""

OTHER_R = 8

PIXELS = 16
"""Along a token's side."""

DENSE_PX = 4096
"""Largest size at which the whole model is run with dense attention."""


def build(device: torch.device, tiny: bool, **layers: int) -> nn.Module:
    """A FLUX.1 in bfloat16 whose weights are small noise, so that nothing overflows."""
    config = {**(TINY if tiny else FLUX), **layers}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    return model


def call_of(model: Any, side: int, device: torch.device) -> dict[str, Any]:
    """Arguments as pipelines give them."""
    config = model.config
    text_len = 512 if config.num_attention_heads == FLUX_HEADS else 16
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)
    noise = {"device": device, "dtype": torch.bfloat16}
    return {
        "hidden_states": torch.randn(1, side * side, config.in_channels, **noise),
        "encoder_hidden_states": torch.randn(1, text_len, config.joint_attention_dim, **noise),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, **noise),
        "timestep": torch.full((1,), 0.5, **noise),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": ids.view(-1, 3).to(device),
        "txt_ids": torch.zeros(text_len, 3, device=device),
        "return_dict": False,
    }


def ready(model: nn.Module, way: str, warm_start: Path | None = None) -> nn.Module:
    """A model as a way of running it wants it."""
    settings = WAYS[way]
    if "r" in settings:
        flexclear.transform(model, r=settings["r"])
    return flexclear.optimize(model, fp8=settings.get("fp8", False), dynamic=True, warm_start=warm_start)


def fresh(device: torch.device) -> None:
    """Memory as if nothing had been measured before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def step(model: nn.Module, side: int, device: torch.device, most: int = 3) -> dict[str, Any]:
    """One step at a size: its first call, the median of up to ``most`` others, and the peak of memory in them."""
    arguments = call_of(model, side, device)
    start = time.perf_counter()
    model(**arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    first = time.perf_counter() - start
    fresh(device)
    measure = timer(device)
    times = [measure(lambda: model(**arguments), 1)]
    while len(times) < most and sum(times) < 5000:
        times.append(measure(lambda: model(**arguments), 1))
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return {"first_call_s": first, "ms": statistics.median(times), "times": times, "peak_gb": peak}


def prepare_all(ways: list[str], tiny: bool, seconds: float) -> dict[str, float]:
    """Compile each way in a process of its own, over one block of each kind; seconds that its first step took."""
    processes = {}
    for way in ways:
        command = [sys.executable, "-m", "bench.gpu.model", "unused", "--prepare", way, *(["--tiny"] if tiny else [])]
        processes[way] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    end, found = time.monotonic() + seconds, {}
    for way, process in processes.items():
        try:
            said, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
            if process.returncode == 0:
                found[way] = json.loads(said.splitlines()[-1])["first_call_s"]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    return found


def dense_from_blocks(model: Any, side: int, device: torch.device) -> dict[str, Any]:
    """A dense step estimated: two models of few blocks tell what a block of each kind takes, and what is left."""
    counts = (model.config.num_layers, model.config.num_single_layers)
    both, singles = model.transformer_blocks, model.single_transformer_blocks
    measured = {}
    try:
        for few in ((1, 1), (2, 1), (1, 2)):
            model.transformer_blocks, model.single_transformer_blocks = both[: few[0]], singles[: few[1]]
            measured[few] = step(model, side, device, 1)
    finally:
        model.transformer_blocks, model.single_transformer_blocks = both, singles
    base = measured[1, 1]["ms"]
    double, single = measured[2, 1]["ms"] - base, measured[1, 2]["ms"] - base
    return {
        "ms": base + (counts[0] - 1) * double + (counts[1] - 1) * single,
        "estimated": "from one block of each kind",
        "peak_gb": measured[1, 1]["peak_gb"],
        "blocks_ms": {"double": double, "single": single, "one of each": base},
    }


@torch.no_grad()
def main(
    out: Annotated[Path, typer.Argument(help="JSON lines, appended to.")],
    limit: Annotated[float, typer.Option(help="Seconds after which no measurement is begun.")] = 180,
    artifacts: Annotated[Path | None, typer.Option(help="Where to save what was compiled for r = 16.")] = None,
    warm: Annotated[Path | None, typer.Option(help="Measure the first step from these artefacts alone.")] = None,
    tiny: Annotated[bool, typer.Option(help="Small sizes, on whatever device there is.")] = False,
    chosen: Annotated[
        list[str] | None, typer.Option("--way", help=f"Only these ways; repeat. {', '.join(WAYS)}; all by default.")
    ] = None,
    largest: Annotated[int, typer.Option(help="Largest size, in pixels.")] = 8192,
    prepare: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure, row by row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    all_sides = (8, 16) if tiny else (64, 128, 256, 512)
    sides = tuple(side for side in all_sides if PIXELS * side <= largest)
    if unknown := [way for way in chosen or () if way not in WAYS]:
        raise typer.BadParameter(f"--way: unknown {', '.join(unknown)}; known are {', '.join(WAYS)}")
    if not sides:
        raise typer.BadParameter(f"--largest must be at least {PIXELS * all_sides[0]} pixels, got {largest}")
    if prepare:
        model = ready(build(device, tiny, num_layers=1, num_single_layers=2), prepare)
        print(json.dumps({way: value for way, value in step(model, sides[0], device, 1).items() if way != "times"}))
        return
    clock = Clock(limit)
    if warm is not None:
        rows = Rows(out, "warm start", device)
        model = ready(build(device, tiny), "r = 16", warm)
        rows.add({"way": "r = 16", "side": sides[0], "cache": "artefacts", **step(model, sides[0], device)})
        return
    rows = Rows(out, "model", device)
    ways = [way for way in chosen or WAYS if not (way.endswith("FP8") and device.type != "cuda")]
    cold = prepare_all(ways, tiny, limit / 2)
    rows.add({"compiled first": cold, "seconds": clock.spent})
    for way in ways:
        measure_way(way, sides, device, tiny, clock, rows, artifacts if way == "r = 16" else None)


def measure_way(
    way: str, sides: tuple[int, ...], device: torch.device, tiny: bool, clock: Clock, rows: Rows, artifacts: Path | None
) -> None:
    """All sizes of one way, on a model of its own."""
    torch.compiler.reset()
    fresh(device)
    if clock.over:
        rows.add({"way": way, "stopped_after_s": clock.limit})
        return
    start = time.perf_counter()
    model = ready(build(device, tiny), way)
    rows.add({"way": way, "built_s": time.perf_counter() - start, "weights_gb": weight_bytes(model) / 1e9})
    measure_sizes(model, way, sides, device, tiny, clock, rows)
    if artifacts is not None:
        save_artifacts(artifacts, artifact_configuration(model, None, "default", True))
        flexclear.transform(model, r=OTHER_R)
        measure_sizes(model, f"r = {OTHER_R}", sides[1:3], device, tiny, clock, rows)


def measure_sizes(
    model: nn.Module, way: str, sides: tuple[int, ...], device: torch.device, tiny: bool, clock: Clock, rows: Rows
) -> None:
    """A row a size; what fails is a row too."""
    for side in sides:
        if clock.over:
            rows.add({"way": way, "stopped_after_s": clock.limit})
            return
        size = {"way": way, "side": side, "px": PIXELS * side}
        try:
            estimated = way == "dense" and (PIXELS * side > DENSE_PX or (tiny and side == sides[-1]))
            found = dense_from_blocks(model, side, device) if estimated else step(model, side, device)
        except Exception as error:  # out of memory at one size, say; other sizes may fit
            rows.add({**size, "failed": f"{type(error).__name__}: {error}"[:400]})
            fresh(device)
            continue
        rows.add({**size, **found})


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    typer.run(main)
