"""One image on several processes: seconds per step, bytes and speed-up; and the model on paper.

    torchrun --nproc-per-node 2 -m bench.parallel.run                   # measures; writes results/parallel.*
    python -m bench.parallel.run --paper                                # the model: results/parallel_model.*

On CPU every process is pinned to a core of its own. Shared outputs are compared with one process's in the same run, and
counted bytes with the formula of ``flexclear.parallel.costs``; either being wrong ends it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import flexclear
from flexclear import parallel
from flexclear.masks import Disc, Layout
from flexclear.parallel.check import Steps
from flexclear.parallel.costs import border_bytes, output_bytes, text_bytes
from flexclear.parallel.planning import cut

from bench.machine import RESULTS, facts, write_results
from bench.parallel import model as parallel_model

TEXT_LEN = 128
HEADS, HEAD_DIM, CHANNELS = 4, 64, 16
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of the largest absolute value, what a shared output may differ by from one process's."""


def make_model(device: torch.device, dtype: torch.dtype, blocks: int) -> Any:
    """A FLUX of ``blocks`` double- and twice as many single-stream blocks with random weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=blocks,
        num_single_layers=2 * blocks,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 28, 28),
    )
    return model.eval().to(device, dtype)


def make_call(height: int, width: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random inputs of ``height`` x ``width`` tokens."""
    from diffusers import FluxPipeline

    generator = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, height * width, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT_LEN, 64, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.full((1,), 0.5),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32),
        "txt_ids": torch.zeros(TEXT_LEN, 3),
    }
    return {name: tensor.to(device, torch.float32 if name.endswith("_ids") else dtype) for name, tensor in call.items()}


def timed(model: Any, call: dict[str, Any], pipe: Steps, device: torch.device) -> tuple[float, torch.Tensor]:
    """Median seconds of a step over a run, the first two left out, and the last output."""
    seconds = []
    output = torch.empty(0)
    for step in range(len(pipe.timesteps)):
        pipe.step_index = step
        begin = time.perf_counter()
        with torch.no_grad():
            output = model(**call, return_dict=False)[0]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:]), output


def timed_alone(model: Any, call: dict[str, Any], pipe: Steps, device: torch.device) -> tuple[float, torch.Tensor]:
    """``timed`` of the whole model on each rank, one rank at a time, so that each has the machine to itself."""
    found = 0.0, torch.empty(0)
    dist.barrier()
    for turn in range(dist.get_world_size()):
        if turn == dist.get_rank():
            found = timed(model, call, pipe, device)
        dist.barrier()
    return found


def difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one."""
    return (output.float() - expected.float()).abs().max().item()


def check(error: float, expected: torch.Tensor, name: str) -> None:
    """
    Raises:
        SystemExit: a shared output differs from one process's by more than rounding.
    """
    if not error <= ROUNDING[expected.dtype] * max(1.0, expected.float().abs().max().item()):
        raise SystemExit(f"wrong: {name} differs by {error}")


def measure(arguments: argparse.Namespace) -> None:
    cuda = torch.cuda.is_available()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    dist.init_process_group("nccl" if cuda else "gloo")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if cuda else "float32"))
    model = make_model(device, dtype, arguments.blocks)
    pipe = Steps(model, arguments.steps)
    rows = []
    for side in arguments.sides:
        call = make_call(side, side, device, dtype)
        layout = Layout(side, side, TEXT_LEN)
        flexclear.transform(model, r=arguments.radius, backend=arguments.backend)
        alone, expected = timed_alone(model, call, pipe, device)
        for text, exchange in (("exact", "sync"), ("average", "sync"), ("exact", "stale")):
            parallel.enable(pipe, text=text, exchange=exchange, warmup_steps=1)
            seconds, output = timed(model, call, pipe, device)
            sent = parallel.sent_bytes(pipe)
            # The input never changes, so stale borders are the current ones.
            error = difference(output, expected)
            if text == "exact":
                check(error, expected, f"{text} + {exchange} at {side} x {side}")
            predicted = formula(layout, arguments, rank, size, text, dtype.itemsize)
            per_step = {name: sent.get(name, 0) / arguments.steps for name in predicted}
            if exchange == "sync" and per_step != predicted:
                raise SystemExit(f"bytes {per_step} are not those of the formula {predicted}")
            parallel.disable(pipe)
            rows.append(
                {
                    "side": side, "r": arguments.radius, "processes": size, "text": text, "exchange": exchange,
                    "seconds": seconds, "alone_seconds": alone, "speed_up": alone / seconds, "error": error,
                    **{f"{kind}_bytes": sent for kind, sent in per_step.items()},
                }
            )  # fmt: skip
        flexclear.restore(model)
    for kind in arguments.dense:
        rows += dense(kind, model, arguments, device, dtype)
    if rank == 0:
        about = facts(
            device, processes=size, dtype=str(dtype).removeprefix("torch."), blocks=3 * arguments.blocks, text=TEXT_LEN,
            steps=arguments.steps,
        )  # fmt: skip
        write_results("parallel", about, rows, table(rows), arguments.out)
        print(table(rows))
    dist.destroy_process_group()


def formula(
    layout: Layout, arguments: argparse.Namespace, rank: int, size: int, text: str, itemsize: int
) -> dict[str, float]:
    """Bytes that this rank sends in a step, by kind."""
    bands = cut(layout, size)
    layers = 3 * arguments.blocks
    return {
        "border": layers * border_bytes(layout, Disc(arguments.radius), bands, rank, HEADS * HEAD_DIM, itemsize),
        "text": layers * text_bytes(TEXT_LEN, HEADS, HEAD_DIM, text) if size > 1 else 0,
        "output": output_bytes(layout, bands, CHANNELS, itemsize),
    }


def dense(
    kind: str, model: Any, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The dense model by diffusers' context parallelism, beside it."""
    # One kernel for one process and several; a ring needs its log-sum-exp, which cuDNN's gives in bfloat16.
    model.set_attention_backend("_native_cudnn" if device.type == "cuda" else "_native_flash")
    rows: list[dict[str, Any]] = []
    pipe = Steps(model, arguments.steps)
    size = dist.get_world_size()
    for side in arguments.sides:
        call = make_call(side, side, device, dtype)
        alone, expected = timed_alone(model, call, pipe, device)
        parallel.enable_dense(model, kind=kind)
        seconds, output = timed(model, call, pipe, device)
        parallel.disable(model)
        error = difference(output, expected)
        check(error, expected, f"dense, {kind} at {side} x {side}")
        rows.append(
            {
                "side": side, "r": "dense", "processes": size, "text": "", "exchange": kind,
                "seconds": seconds, "alone_seconds": alone, "speed_up": alone / seconds, "error": error,
            }
        )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows in Markdown."""
    lines = [
        "| tokens | r | processes | text | exchange | s per step | one process, s | speed-up | border, KB per step | text, KB | "
        "output, KB | largest difference |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        kilobytes = [
            f"{row[name] / 1e3:.0f}" if name in row else "" for name in ("border_bytes", "text_bytes", "output_bytes")
        ]
        lines.append(
            f"| {row['side']} x {row['side']} | {row['r']} | {row['processes']} | {row['text']} | {row['exchange']} | "
            f"{row['seconds']:.3f} | {row['alone_seconds']:.3f} | {row['speed_up']:.2f} | "
            f"{' | '.join(kilobytes)} | {row['error']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="the model on paper, no processes")
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 96], help="tokens along each side")
    parser.add_argument("--radius", type=int, default=8, help="window radius in tokens")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument(
        "--dense",
        choices=["ring", "ulysses"],
        nargs="*",
        default=["ring", "ulysses"],
        help="the dense model beside it, by diffusers' context parallelism; without a name: not at all",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.paper:
        rows = parallel_model.rows()
        arguments.out.mkdir(parents=True, exist_ok=True)
        about = {"model": "FLUX.1-dev, bf16, r = 16, 512 text tokens", "device": "H100 (times of arXiv 2412.16112)"}
        write_results("parallel_model", about, rows, parallel_model.table(rows), arguments.out)
        parallel_model.plot(rows, arguments.out / "parallel_model.png")
        print(parallel_model.table(rows))
        return
    if "RANK" not in os.environ:
        raise SystemExit("start with torchrun --nproc-per-node N -m bench.parallel.run, or give --paper")
    measure(arguments)


if __name__ == "__main__":
    main()
