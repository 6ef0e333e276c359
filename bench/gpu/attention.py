"""Attention alone on a GPU, at the shapes of FLUX.1 and SD3.5: dense, raster order, and ours over blocks and kernel options.

    python -m bench.gpu.attention rows.jsonl --limit 120         # on CUDA
    python -m bench.gpu.attention rows.jsonl --tiny              # a trial of the program itself, on any machine

Rows are written as they are measured, so that a run that is stopped keeps what it has. The variants of a group take turns;
times are medians of CUDA events, each beside its error against float32. Kernels are compiled in several processes first.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexclear.compile.kernels import Options, check_kernel_options, choose, with_kernel
from flexclear.masks import Disc, Layout, block_mask, cost
from flexclear.masks.apart import TextApart
from flexclear.measuring.attention import reference
from flexclear.runtime.attention import windowed_attention
from flexclear.runtime.plan import build_plan

from bench.gpu.rows import Clock, Rows

SAMPLED = 128
"""Query rows that are compared with float32."""

MANY = 200_000
"""Tokens above which a dense call takes seconds: the slower dense kernel is left out, and there are fewer rounds."""


@dataclass(frozen=True)
class Shape:
    """Attention of one model."""

    name: str
    heads: int
    head_dim: int
    text_len: int
    text_first: bool

    def layout(self, side: int, order: str = "tiled") -> Layout:
        return Layout(side, side, self.text_len, self.text_first, order)


SHAPES = (Shape("FLUX.1", 24, 128, 512, True), Shape("SD3.5-large", 38, 64, 333, False))


@dataclass(frozen=True)
class Spec:
    """One way to build the window's kernel; no block size and no options: what flexclear chooses, and so with the text apart
    and where coordinates come from."""

    name: str
    block_size: tuple[int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    order: str = "tiled"
    changes: dict[str, Any] = field(default_factory=dict)


CHOSEN = Spec("chosen")
ONE_CALL = Spec("chosen, text and image in one call", changes={"text_apart": False})
COMPUTED = Spec("chosen, coordinates computed", changes={"coordinates": "computed"})
RASTER = Spec("raster order", (128, 128), order="raster", changes={"text_apart": False})
STANDARD = (CHOSEN, ONE_CALL, COMPUTED, RASTER)


def tiled(blocks: tuple[int, int], tile: tuple[int, int], warps: int, stages: int, **others: Any) -> Spec:
    """A spec with everything named."""
    options = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "num_warps": warps, "num_stages": stages, **others}
    name = f"blocks {blocks[0]} x {blocks[1]}, tile {tile[0]} x {tile[1]}, {warps} warps, {stages} stages"
    return Spec(name + "".join(f", {key} {value}" for key, value in others.items()), blocks, options)


FLASH = Spec("FlashAttention 4", None, {"BACKEND": "FLASH"})
SWEEPS = {
    128: (
        tiled((64, 64), (64, 64), 4, 2),
        tiled((64, 64), (64, 64), 4, 4),
        tiled((64, 64), (64, 64), 4, 3, USE_TMA=True),
        tiled((64, 64), (64, 64), 4, 3, PRESCALE_QK=True),
        tiled((64, 64), (64, 64), 4, 3, IS_DIVISIBLE=False),
        tiled((64, 64), (64, 64), 8, 3),
        tiled((64, 128), (64, 64), 4, 3),
        tiled((64, 32), (64, 32), 4, 4),
        tiled((128, 64), (128, 64), 8, 3),
        tiled((128, 128), (128, 128), 8, 3),
        tiled((128, 128), (64, 64), 4, 3),
        FLASH,
    ),
    64: (
        tiled((64, 128), (64, 128), 4, 3),
        tiled((64, 128), (64, 128), 4, 1),
        tiled((64, 128), (64, 128), 4, 2, USE_TMA=True),
        tiled((64, 128), (64, 128), 4, 2, PRESCALE_QK=True),
        tiled((64, 128), (64, 128), 8, 2),
        tiled((64, 256), (64, 256), 8, 2),
        tiled((64, 64), (64, 64), 4, 3),
        tiled((128, 64), (128, 64), 8, 3),
        tiled((128, 128), (64, 128), 4, 2),
        FLASH,
    ),
}
"""Specs that are compared with the choice, by head dim."""


def attention_of(spec: Spec, shape: Shape, side: int, r: int, like: Tensor) -> tuple[Layout, Any]:
    """Layout and mask (for ``windowed_attention``) of a spec; raises ValueError where this GPU cannot run it."""
    layout = shape.layout(side, spec.order)
    options: Options = check_kernel_options(spec.options)
    kernel = choose(
        like.device,
        like.dtype,
        shape.head_dim,
        reach=r,
        seq_len=layout.seq_len,
        block_size=spec.block_size,
        options=options,
    )
    return layout, build_plan(
        layout, Disc(r), "flex", replace(kernel, **spec.changes), like.device, backward=False
    ).mask


def inputs(shape: Shape, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as projections give them: ``[1, N, heads, D]`` in memory."""
    torch.manual_seed(0)
    size = (1, shape.layout(side).seq_len, shape.heads, shape.head_dim)
    query, key, value = (torch.randn(size, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    return query, key, value


def timer(device: torch.device) -> Callable[[Callable[[], Any], int], float]:
    """Milliseconds of one call, of several in a row: on a GPU a single short one would be timed with its launch."""

    def on_gpu(run: Callable[[], Any], calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    def on_cpu(run: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return 1e3 * (time.perf_counter() - start) / calls

    return on_gpu if device.type == "cuda" else on_cpu


def repeats(measure: Callable[[Callable[[], Any], int], float], run: Callable[[], Any]) -> int:
    """Calls that take about 10 ms together."""
    return max(1, min(50, round(10 / measure(run, 3))))


def dense_runs(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Dense SDPA by the kernels that PyTorch has for it."""
    kinds = {"dense, cuDNN": SDPBackend.CUDNN_ATTENTION, "dense, FlashAttention 2": SDPBackend.FLASH_ATTENTION}
    if query.shape[2] > MANY:
        del kinds["dense, FlashAttention 2"]
    if query.device.type != "cuda":
        kinds = {"dense": SDPBackend.FLASH_ATTENTION}

    def with_kind(kind: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(query, key, value)

        return run

    return {name: with_kind(kind) for name, kind in kinds.items()}


@dataclass
class Running:
    """A variant of a group while it is measured."""

    run: Callable[[], Tensor]
    row: dict[str, Any]
    calls: int = 1
    times: list[float] = field(default_factory=list)


def group(
    shape: Shape, side: int, r: int, specs: tuple[Spec, ...], dense: bool, rounds: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Rows of all variants at one size and radius."""
    query, key, value = inputs(shape, side, device)
    rows = torch.randperm(query.shape[2])[:SAMPLED]
    about = {"shape": shape.name, "side": side, "px": 16 * side, "tokens": query.shape[2], "r": r}
    present: list[Running] = []
    measure = timer(device)

    def add(name: str, run: Callable[[], Tensor], layout: Layout, window: Disc | None, **facts: Any) -> str | None:
        try:
            out = run()
            expected = reference(query, key, value, layout, window, rows)
        except Exception as error:  # a variant that fails is a row, and does not stop the others
            return f"{type(error).__name__}: {error}"[:400]
        error = (out[:, :, rows.to(device)].float() - expected).norm() / expected.norm()
        row = {**about, "variant": name, **facts, "relative_error": float(error)}
        present.append(Running(run, row, repeats(measure, run)))
        return None

    if dense:
        for name, run in dense_runs(query, key, value).items():
            failed = add(name, run, shape.layout(side), None)
            if failed is not None:
                yield {**about, "variant": name, "failed": failed}
    for spec in specs:
        try:
            layout, mask = attention_of(spec, shape, side, r, query)
        except ValueError as error:
            yield {**about, "variant": spec.name, "not_run": str(error)}
            continue
        lists = mask.image if isinstance(mask, TextApart) else mask
        spent = cost(layout, Disc(r), block_size=lists.BLOCK_SIZE, channels=shape.heads * shape.head_dim)
        facts = {
            "block_size": list(lists.BLOCK_SIZE),
            "options": dict(lists.kernel_options),
            "density": spent.density,
            "executed_pairs": spent.executed_pairs,
            "amplification": spent.amplification,
        }
        failed = add(spec.name, lambda mask=mask: windowed_attention(query, key, value, mask), layout, Disc(r), **facts)
        if failed is not None:
            yield {**about, "variant": spec.name, "failed": failed}
    for _ in range(rounds if query.shape[2] <= MANY else 2):
        for variant in present:
            variant.times.append(measure(variant.run, variant.calls))
    for variant in present:
        ms = statistics.median(variant.times)
        pairs = variant.row.get("executed_pairs", query.shape[2] ** 2)
        flops = 4 * pairs * shape.heads * shape.head_dim
        yield {**variant.row, "ms": ms, "executed_tflops": flops / ms / 1e9, "times": variant.times}


def backward_group(shape: Shape, side: int, r: int, rounds: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Forward and backward passes together, against dense FlashAttention."""
    query, key, value = (tensor.requires_grad_() for tensor in inputs(shape, side, device))
    kernel = choose(device, query.dtype, shape.head_dim, backward=True)
    layout = shape.layout(side)
    mask = block_mask(layout, Disc(r), block_size=kernel.block_size, device=device, backward=True)
    mask = with_kernel(mask, kernel)
    grad = torch.randn_like(query)
    runs = {**dense_runs(query, key, value), "chosen": lambda: windowed_attention(query, key, value, mask)}
    about = {"shape": shape.name, "side": side, "px": 16 * side, "tokens": query.shape[2], "r": r}
    measure, times = timer(device), {}

    def both(run: Callable[[], Tensor]) -> None:
        torch.autograd.grad(run(), (query, key, value), grad)

    for name, run in runs.items():
        try:
            both(run)
            times[name] = []
        except Exception as error:
            yield {**about, "variant": f"{name}, with backward", "failed": f"{type(error).__name__}: {error}"[:400]}
    for _, name in itertools.product(range(rounds), times):
        times[name].append(measure(lambda name=name: both(runs[name]), 3))
    for name, found in times.items():
        yield {**about, "variant": f"{name}, with backward", "ms": statistics.median(found), "times": found}


def prepare(part: int, parts: int, device: torch.device) -> None:
    """Compile a share of all kernels, into Inductor's cache on disk."""
    jobs = [(spec, shape) for shape in SHAPES for spec in (*STANDARD, *SWEEPS[shape.head_dim])]
    for spec, shape in jobs[part::parts]:
        query, key, value = inputs(shape, 64, device)
        try:
            _, mask = attention_of(spec, shape, 64, 16, query)
            windowed_attention(query, key, value, mask)
        except Exception as error:
            print(f"{shape.name}, {spec.name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


def prepare_all(parts: int, seconds: float) -> None:
    """``prepare`` in several processes, which are stopped after ``seconds``."""
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.attention", "unused", "--prepare", json.dumps([part, parts])],
            env=environment,
        )
        for part in range(parts)
    ]
    end = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@torch.no_grad()
def main(
    out: Annotated[Path, typer.Argument(help="JSON lines, appended to.")],
    limit: Annotated[float, typer.Option(help="Seconds after which no group is begun.")] = 120,
    processes: Annotated[int, typer.Option(help="That compile first; 0: none.")] = 12,
    sweep: Annotated[bool, typer.Option(help="Blocks and kernel options, not the chosen ones alone.")] = True,
    only_backward: Annotated[bool, typer.Option(help="Forward and backward passes together, nothing else.")] = False,
    tiny: Annotated[bool, typer.Option(help="Small sizes, on whatever device there is.")] = False,
    prepare_part: Annotated[str, typer.Option("--prepare", hidden=True)] = "",
) -> None:
    """Measure, row by row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if prepare_part:
        prepare(*json.loads(prepare_part), device)
        return
    rows, clock = Rows(out, "backward" if only_backward else "attention", device), Clock(limit)
    shapes, sides = SHAPES, (64, 128, 256, 512)
    if tiny:
        shapes = tuple(Shape(shape.name, 1, shape.head_dim, 5, shape.text_first) for shape in SHAPES)
        sides = (16,)
    if only_backward:
        if device.type == "cuda":  # on CPU FlexAttention has no backward pass
            measure_backward(shapes, sides[:3], clock, rows, device)
        return
    if device.type == "cuda" and processes and not tiny:
        prepare_all(processes, limit / 2)
        rows.add({"variant": "compiled first", "seconds": clock.spent})
    # What decides most comes first, so that a run that is stopped has it: all sizes, then the sweep, then other radii.
    jobs = [(shape, side, 16, True, ()) for side in sides for shape in shapes]
    if sweep:
        swept = sides[-2:-1] or sides
        jobs += [(shape, side, 16, False, SWEEPS[shape.head_dim]) for side in swept for shape in shapes]
    jobs += [(shape, side, r, False, ()) for side in sides[1:3] for r in (8, 32) for shape in shapes]
    for shape, side, r, dense, specs in jobs:
        if clock.over:
            rows.add({"variant": "stopped", "limit_s": limit})
            return
        start = clock.spent
        for row in group(shape, side, r, (*STANDARD, *specs[: 2 if tiny else None]), dense, 5, device):
            rows.add(row)
        rows.add({"variant": f"{shape.name} at {side}, r = {r}: whole group", "seconds": clock.spent - start})


@torch.enable_grad()
def measure_backward(
    shapes: tuple[Shape, ...], sides: tuple[int, ...], clock: Clock, rows: Rows, device: torch.device
) -> None:
    """Forward and backward passes of every shape and size."""
    for side, shape in itertools.product(sides, shapes):
        if clock.over:
            return
        for row in backward_group(shape, side, 16, 5, device):
            rows.add(row)


if __name__ == "__main__":
    typer.run(main)
