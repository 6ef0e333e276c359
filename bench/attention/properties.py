"""The paper's Table 1 as measured facts: locality, softmax, rank and token integrity of every mechanism.

Run ``python -m bench.attention.properties``; it writes ``bench/results/properties.json`` and ``properties.md``.

One layer of the embedded model in the middle of drawing a 128 px image, 16 x 16 tokens. Sizes are the published ones by
four, as the grid's sides are: 16 keys where FLUX.1 has 256.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flexclear import embedded
from flexclear.alternatives import (
    AgentAttention,
    NeighborhoodAttention,
    PixArtAttention,
    StridedAttention,
    SwinAttention,
)
from flexclear.alternatives.properties import compare, table

from bench.machine import RESULTS, facts, write_results

ROWS: dict[str, dict[str, Any]] = {
    "dense": {"r": None},
    "linear": {"attention": "linear"},
    "sigmoid": {"attention": "sigmoid"},
    "PixArt-Sigma, 4 x 4": {"attention": PixArtAttention(4)},
    "agent, 16 agents": {"attention": AgentAttention(4)},
    "strided, 4": {"attention": StridedAttention(4)},
    "Swin, 4 x 4": {"attention": SwinAttention(4)},
    "neighborhood, 4 x 4": {"attention": NeighborhoodAttention(4)},
    "CLEAR, r = 2": {"r": 2},
    "CLEAR, r = 4": {"r": 4},
    "CLEAR, r = 8": {"r": 8},
    "CLEAR, r = 2, down-sampled keys": {"r": 2, "down_factor": 4},
}


def main(
    prompt: Annotated[str, typer.Option(help="What is drawn.")] = "an apple",
    pixels: Annotated[int, typer.Option(min=64, help="Side of the image.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps; the middle one is measured.")] = 8,
    layer: Annotated[str, typer.Option(help="Which attention layer.")] = "single_transformer_blocks.1.attn",
    tokens: Annotated[int, typer.Option(min=1, help="Image tokens tried for integrity.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure every mechanism on one layer of the embedded model and write JSON and Markdown."""
    torch.set_num_threads(threads)
    pipe = embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    generator = torch.Generator().manual_seed(seed)
    pipe(
        prompt, height=pixels, width=pixels, num_inference_steps=steps, max_sequence_length=32, generator=generator,
        output_type="latent",
    )  # fmt: skip
    hook.remove()
    found = compare(pipe.transformer, calls[len(calls) // 2], layer, ROWS, tokens)
    printed = table(found)
    about = facts(
        torch.device("cpu"),
        prompt=prompt,
        pixels=pixels,
        step=f"{len(calls) // 2} of {len(calls)}",
        layer=layer,
        seed=seed,
    )
    write_results(
        "properties", about, [{"attention": title, **asdict(row)} for title, row in found.items()], printed, output
    )
    print(printed)


if __name__ == "__main__":
    typer.run(main)
