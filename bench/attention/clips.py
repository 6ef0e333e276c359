"""Attention over a video on a CPU: windows in the order that suits them, in bands of 4 x 4 and in raster order, against dense
attention; and a step of a reduced Wan.

    python -m bench.attention.clips                            # two CPU cores: about seven minutes
    python -m bench.attention.clips --no-step

21 x 24 x 40 tokens (81 frames of 384 x 640 px of Wan), bfloat16. The step is one call of diffusers' ``WanTransformer3DModel``
with random weights, 2 blocks of 4 heads x 128, plain and through ``flexclear.transform``. Ways take turns in one run; times are
medians, ratios medians of the rounds' ratios, each way checked against float32. Results go to
bench/results/attention-clips.{json,md}.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

import flexclear
from flexclear.compile.kernels import choose
from flexclear.masks import Layout, Tube, all_frames, cost, cylinder, suited
from flexclear.measuring.attention import check_error, inputs, relative_error
from flexclear.measuring.timing import timed
from flexclear.runtime.attention import windowed_attention
from flexclear.runtime.plan import build_plan

from bench.machine import RESULTS, facts, write_results

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
SHAPE = (21, 24, 40)
WINDOWS = {
    "cylinder(8, 2)": cylinder(8, 2),
    "cylinder(8, 4)": cylinder(8, 4),
    "all_frames(4)": all_frames(4),
    "all_frames(8)": all_frames(8),
}
STEP = {"cylinder(8, 4)": (8, 4), "all_frames(4)": (4, "all")}


def orders(layout: Layout, window: Tube) -> dict[str, Layout]:
    """The layout in the order that suits the window, and in others."""
    chosen = suited(layout, window)
    return {
        f"bands {chosen.order}": chosen,
        "bands (4, 4)": layout.with_order((4, 4)),
        "raster": layout.with_order("raster"),
    }


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run, CPU))
    return times


def row(what: str, window: str, way: str, times: dict[str, list[float]], name: str, **more: Any) -> dict[str, Any]:
    """One line of the table."""
    ratios = [dense / own for dense, own in zip(times["dense"], times[name], strict=True)]
    return {
        "what": what,
        "window": window,
        "way": way,
        "s": statistics.median(times[name]),
        "times_s": times[name],
        "x_dense": statistics.median(ratios),
        **more,
    }


@torch.no_grad()
def attention(heads: int, head_dim: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of attention alone.

    Raises:
        ArithmeticError: a result is wrong.
    """
    frames, height, width = SHAPE
    layout = Layout(height, width, 0, frames=frames)
    tensors = inputs(layout, heads, head_dim, CPU, DTYPE)
    runs: dict[str, Callable[[], Tensor]] = {"dense": lambda: F.scaled_dot_product_attention(*tensors)}
    about: dict[str, dict[str, Any]] = {}
    kernel = choose(CPU, DTYPE, head_dim, reach=8, seq_len=layout.seq_len)
    for label, window in WINDOWS.items():
        for way, ordered in orders(layout, window).items():
            mask = build_plan(ordered, window, "flex", kernel, CPU, backward=False).mask
            name = f"{label}, {way}"
            runs[name] = lambda mask=mask: windowed_attention(*tensors, mask)
            error = relative_error(runs[name](), tensors, ordered, window)
            check_error(error, DTYPE, name)
            spent = cost(ordered, window, block_size=kernel.block_size)
            about[name] = {"window": label, "way": way, "error": error, "executed_over_useful": spent.amplification}
    times = in_turns(runs, rounds)
    dense = row("attention", "", "dense", times, "dense")
    return [dense, *(row("attention", times=times, name=name, **more) for name, more in about.items())]


@torch.no_grad()
def step(rounds: int) -> list[dict[str, Any]]:
    """Rows of a whole step."""
    from diffusers import WanTransformer3DModel

    def model() -> Any:
        torch.manual_seed(0)
        return WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=128, ffn_dim=2048, num_layers=2, text_dim=64
        ).to(DTYPE).eval()  # fmt: skip

    frames, height, width = SHAPE
    generator = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, generator=generator).to(DTYPE),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, 64, generator=generator).to(DTYPE),
    }
    plain = model()
    runs: dict[str, Callable[[], Any]] = {"dense": lambda: plain(**call)}
    about = {}
    for label, (r, frame_radius) in STEP.items():
        for order in ("tiled", "raster"):
            own = flexclear.transform(model(), r=r, frame_radius=frame_radius, order=order)
            name = f"{label}, {order}"
            runs[name] = lambda own=own: own(**call)
            about[name] = {"window": label, "way": "suited" if order == "tiled" else order}
    for run in runs.values():
        run()
    times = in_turns(runs, rounds)
    dense = row("step", "", "dense", times, "dense")
    return [dense, *(row("step", times=times, name=name, **more) for name, more in about.items())]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| | window | order | s | x dense | executed over useful | error to float32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        executed = f"{one['executed_over_useful']:.2f}" if "executed_over_useful" in one else ""
        error = f"{one['error']:.1e}" if "error" in one else ""
        lines.append(
            f"| {one['what']} | {one['window']} | {one['way']} | {one['s']:.2f} | {one['x_dense']:.2f} | {executed} | {error} |"
        )
    return "\n".join(lines) + "\n"


def main(
    heads: int = 2,
    head_dim: int = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    step_rounds: Annotated[int, typer.Option(min=1)] = 3,
    with_step: Annotated[bool, typer.Option("--step/--no-step", help="Also a step of a reduced Wan.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure and write."""
    console = Console(stderr=True)
    rows = attention(heads, head_dim, rounds)
    console.print(table(rows), highlight=False)
    if with_step:
        rows += step(step_rounds)
    about = facts(CPU, dtype="bfloat16", heads=heads, head_dim=head_dim, median_of=rounds, steps_median_of=step_rounds)
    write_results("attention-clips", about, rows, table(rows), out)
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
