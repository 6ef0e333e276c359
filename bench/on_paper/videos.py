"""Seconds that a step of a published video model takes on one H100, dense and under windows: computed, not measured.

    python -m bench.on_paper.videos                                              # two minutes, needs no GPU

FLOPs are counted in the forward pass of diffusers' own models at full width and depth, on meta tensors; what windows execute is
counted block by block, in the order that suits each and in the blocks of a kernel for sm_90; rates are the published ones
(``flexclear.rates``, measured over images). What others report of their own methods stands beside it, as theirs. Writes
``bench/results/videos_on_paper.{json,md}``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.flop_counter import FlopCounterMode

from flexclear.compile.kernels import find_row
from flexclear.masks import (
    Cost,
    Layout,
    Window,
    all_frames,
    ball,
    block_mask,
    cost,
    cylinder,
    radial,
    suited,
)
from flexclear.masks.apart import text_apart
from flexclear.masks.windows import captured_tensors
from flexclear.rates.rates import Rates, block_flops, published

from bench.machine import RESULTS, facts, write_results

Row = dict[str, Any]

NAME = "videos_on_paper"
META, BFLOAT16 = torch.device("meta"), torch.bfloat16
H100 = (9, 0)

WINDOWS: dict[str, Window] = {
    "cylinder(16, 4)": cylinder(16, 4),
    "all_frames(8)": all_frames(8),
    "ball(16, 4)": ball(16, 4),
    "radial(32)": radial(32),
    "cylinder(8, 4)": cylinder(8, 4),
}

THEIRS = (
    ("STA", "2502.04507", "HunyuanVideo, H100, all steps: 945 s dense (FlashAttention 3), 501 s; finetuned 268 s"),
    ("VSA", "2505.13389", "Wan 2.1 14B, all steps: 1274 s dense, 576 s; trained"),
    ("Radial Attention", "2506.19852", "1.9 x (Wan 2.1 14B, HunyuanVideo, Mochi); 3.7 x at four times the length"),
    ("SVG", "2505.18875", "1.9 to 2.0 x on an H100 (its author, in a discussion)"),
    ("GNA", "2504.16922", "28 to 46 % end to end on a B200 (Cosmos 7B, HunyuanVideo, FLUX)"),
)
"""Method, arXiv number of its paper, and what its authors report of it."""


@dataclass(frozen=True)
class Video:
    """A published model at the size that it is known for.

    Attributes:
        name: as tables show it.
        frames: of the video.
        layout: attention's sequence, in any order.
        layers, heads, head_dim: of the attention that windows replace.
        passes: forward passes of a step, two with classifier-free guidance.
        steps: of its pipeline, by default.
        build: the transformer in diffusers' own configuration, and the arguments of a forward pass.
    """

    name: str
    frames: int
    layout: Layout
    layers: int
    heads: int
    head_dim: int
    passes: int
    steps: int
    build: Callable[[Layout], tuple[nn.Module, dict[str, Any]]]

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=BFLOAT16, device=META)


def _latents(layout: Layout) -> Tensor:
    return _empty(1, 16, layout.frames, 2 * layout.height, 2 * layout.width)


def _wan(layout: Layout) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    with META:
        model = WanTransformer3DModel()
    call = {"hidden_states": _latents(layout), "encoder_hidden_states": _empty(1, 512, 4096), "timestep": _empty(1)}
    return model, call


def _hunyuan(layout: Layout) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import HunyuanVideoTransformer3DModel

    with META:
        model = HunyuanVideoTransformer3DModel()
    text = layout.text_len
    call = {
        "hidden_states": _latents(layout),
        "encoder_hidden_states": _empty(1, text, 4096),
        "encoder_attention_mask": torch.empty(1, text, dtype=torch.bool, device=META),
        "pooled_projections": _empty(1, 768),
        "timestep": _empty(1),
        "guidance": _empty(1),
    }
    return model, call


WAN = Video("Wan 2.1 14B, 720p", 81, Layout(45, 80, 0, frames=21), 40, 40, 128, 2, 50, _wan)
HUNYUAN = Video("HunyuanVideo, 720p", 129, Layout(45, 80, 256, False, frames=33), 60, 24, 128, 1, 50, _hunyuan)


@dataclass(frozen=True)
class Flops:
    """Of one forward pass of one sample.

    Attributes:
        windowed: products of the attention that windows replace, dense.
        other_attention: of all other attention, such as to text.
        linear: of linears and convolutions.
    """

    windowed: int
    other_attention: int
    linear: int

    @property
    def share(self) -> float:
        """Of the attention that windows replace."""
        return self.windowed / (self.windowed + self.other_attention + self.linear)


@functools.cache
def count_flops(video: Video) -> Flops:
    """What diffusers' forward pass multiplies.

    Raises:
        RuntimeError: a layer's attention is not over the layout's sequence.
    """
    layout = video.layout
    model, call = video.build(layout)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to(BFLOAT16)(**call)
    by_module = {name: _by_kind(counts) for name, counts in counter.get_flop_counts().items()}
    attention, linear = by_module["Global"]
    each = 4 * video.channels * layout.seq_len**2
    layers = sum(by_module[name][0] == each for name in by_module if name.rpartition(".")[2] in ("attn", "attn1"))
    if layers != video.layers:
        raise RuntimeError(f"{video.name}: {layers} layers attend over {layout.seq_len} tokens, not {video.layers}")
    return Flops(layers * each, attention - layers * each, linear)


def _by_kind(counts: dict[Any, int]) -> tuple[int, int]:
    """FLOPs of attention, which multiplies batches, and of all else."""
    attention = sum(number for kind, number in counts.items() if str(kind) == "aten.bmm")
    return attention, sum(counts.values()) - attention


def lists_and_tables(layout: Layout, window: Window, block_size: tuple[int, int]) -> int:
    """Bytes on a GPU of a window's block lists, and of what its ``mask_mod`` captures."""
    if layout.text_len:
        mask: BlockMask = text_apart(layout, window, block_size=block_size, coordinates="packed", narrow=True).image
    else:
        mask = block_mask(layout, window, block_size=block_size, coordinates="packed", narrow=True)
    held = [part for part in mask.as_tuple(flatten=True) if isinstance(part, Tensor)] + captured_tensors(mask.mask_mod)
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def slower(window: str, kernels: list[Row]) -> tuple[float, float]:
    """How many times as long as an image's a clip's loops over full and over partial blocks are, as compiled for sm_90 where no
    block divides the length, from rows of ``bench/results/kernels.json``."""
    name = "clip, radial" if window.startswith("radial") else "clip, cylinder"
    own, image = (_loops(kernels, mask) for mask in (f"{name}, lengths that do not divide", "disc"))
    return own[1] / image[1], own[0] / image[0]


def _loops(kernels: list[Row], mask: str) -> list[int]:
    wanted = {"section": "clips", "name": mask, "capability": list(H100)}
    (kernel,) = (
        row["kernels"][0]
        for row in kernels
        if all(row[key] == value for key, value in wanted.items())
        and (row["case"]["head_dim"], row["case"]["backward"]) == (128, False)
    )
    return [loop["instructions"] for loop in kernel["loops"]]


def study(video: Video, rates: Rates, kernels: list[Row]) -> list[Row]:
    """The dense pass, then one of each window."""
    flops = count_flops(video)
    rest = flops.linear / rates.linear + flops.other_attention / rates.dense
    dense = flops.windowed / rates.dense
    about = {"model": video.name, "tokens": video.layout.seq_len, **dataclasses.asdict(flops)}
    rows = [{**about, "window": "dense", "attention_s": dense, "rest_s": rest, "pass_s": dense + rest}]
    block_size = find_row(H100, BFLOAT16, video.head_dim).block_size
    for name, window in WINDOWS.items():
        layout = suited(video.layout, window)
        spent = cost(layout, window, channels=video.channels, block_size=block_size)
        taken = video.layers * rates.windowed_s(spent)
        full, partial = (
            part * longer / rate
            for part, longer, rate in zip(
                block_flops(spent), slower(name, kernels), (rates.full, rates.partial), strict=True
            )
        )
        cautious = video.layers * (full + partial + rates.call)
        rows.append(
            {
                **about,
                "window": name,
                "order": layout.order,
                **_of_cost(spent),
                "attention_s": taken,
                "rest_s": rest,
                "pass_s": taken + rest,
                "gain": (dense + rest) / (taken + rest),
                "cautious_pass_s": cautious + rest,
                "cautious_gain": (dense + rest) / (cautious + rest),
                "bytes": lists_and_tables(layout, window, block_size),
            }
        )
    return rows


def _of_cost(spent: Cost) -> Row:
    return {
        "density": spent.density,
        "executed_over_useful": spent.amplification,
        "work_of_dense": 1 / spent.predicted_speedup,
        "full": spent.full,
        "partial": spent.partial,
    }


def table(rows: list[Row], rates: Rates) -> str:
    """The results in Markdown."""
    parts = [
        "# Video models on one H100: COMPUTED, NOT MEASURED\n",
        f"`python -m bench.on_paper.videos`. No GPU has run a window over frames. Rates are those of images, {rates}; dense "
        "attention's is that of cuDNN. The rate of linears includes norms, rotary embeddings and the rest. Executed work is "
        "exact, in blocks of 64 x 64 (the kernel for sm_90 at head dim 128), tokens in the order that suits the window. A pass "
        "is one forward pass of the transformer, one sample, without text encoders and VAE.\n",
        '"Cautious" takes every block to be slower than an image\'s by as much as the compiled loop over it is longer, where no '
        "block divides the length (`kernels.md`): what the longer masks would cost if a loop took as long as it has "
        "instructions.\n",
    ]
    for video in (WAN, HUNYUAN):
        own = [row for row in rows if row["model"] == video.name]
        parts += [_of_model(video, own), _table_of(video, own)]
    lines = [f"| {method} | {paper} | {what} |" for method, paper, what in THEIRS]
    parts += [
        "## What others report of their own, on their machines and sizes\n",
        "Theirs, not measured here, and not the same task: some are trained, some choose windows by head or step.\n",
        "| method | arXiv | reported |\n|---|---|---|\n" + "\n".join(lines) + "\n",
    ]
    return "\n".join(parts)


def _of_model(video: Video, rows: list[Row]) -> str:
    dense = rows[0]
    total = dense["windowed"] + dense["other_attention"] + dense["linear"]
    every = dense["pass_s"] * video.passes * video.steps
    return (
        f"## {video.name}\n\n{video.frames} frames, {' x '.join(map(str, video.layout.shape))} tokens and "
        f"{video.layout.text_len} of text in attention, {video.layers} layers of {video.heads} heads x {video.head_dim}. A dense "
        f"pass is {total / 1e15:.2f} PFLOPs, {dense['windowed'] / total:.0%} of them attention that windows replace: "
        f"{dense['attention_s']:.1f} s of {dense['pass_s']:.1f} s ({dense['attention_s'] / dense['pass_s']:.0%}). "
        f"{video.steps} steps of {video.passes} {'pass' if video.passes == 1 else 'passes'}: {every:.0f} s dense.\n"
    )


def _table_of(video: Video, rows: list[Row]) -> str:
    head = ["window", "pairs of dense", "executed / useful", "attention, s", "pass, s", "gain", "cautious pass, s"]
    head += ["cautious gain", f"{video.steps} steps, s", "lists and tables, MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        steps = video.passes * video.steps * row["pass_s"]
        cells = [
            row["window"],
            "",
            "",
            f"{row['attention_s']:.2f}",
            f"{row['pass_s']:.2f}",
            "1",
            "",
            "",
            f"{steps:.0f}",
            "",
        ]
        if "gain" in row:
            cells[1:3] = [f"{row['density']:.2%}", f"{row['executed_over_useful']:.2f}"]
            cells[5:8] = [f"{row['gain']:.2f} x", f"{row['cautious_pass_s']:.2f}", f"{row['cautious_gain']:.2f} x"]
            cells[9] = f"{row['bytes'] / 1e6:.1f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS) -> None:
    """Count, and write the table."""
    kernels = json.loads((RESULTS / "kernels.json").read_text())["rows"]
    rates, rows = published(128), []
    for video in (WAN, HUNYUAN):
        start = time.perf_counter()
        rows += study(video, rates, kernels)
        sys.stderr.write(f"{video.name}: {time.perf_counter() - start:.0f} s\n")
    about = facts(torch.device("cpu"), hardware="one H100 (sm_90), computed", rates=rates.source)
    write_results(NAME, about, rows, table(rows, rates), out)


if __name__ == "__main__":
    typer.run(main)
