"""The process of one job: a published model's calls on a GPU that is not there. A job as JSON in, a row a call out.

PYTHONPATH=tests python -m fakegpu.study '{"model": "FLUX.1-dev", "pixels": [1024], "precision": "rowwise"}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PRECISIONS = ("bfloat16", "rowwise", "tensorwise")


@dataclass(frozen=True)
class Job:
    """What is called, and how.

    Attributes:
        model: a name of ``published.CONFIGS``.
        pixels: sides of the square images, in the order of the calls; each size is called twice, then the first again.
        precision: one of ``PRECISIONS``; the last two are FP8 recipes.
        compiled: whether blocks are.
        from_cpu: whether the weights are on the CPU when they are quantized.
        lora: whether a LoRA is loaded and exchanged for another, where each size has been called.
        tiny: of few blocks and heads.
        r: window radius in tokens.
        capability: of the GPU.
    """

    model: str
    pixels: tuple[int, ...] = (1024,)
    precision: str = "bfloat16"
    compiled: bool = True
    from_cpu: bool = False
    lora: bool = False
    tiny: bool = False
    r: int = 16
    capability: tuple[int, int] = (9, 0)


def rows(job: Job, limit: float | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a job, one by one, from a process of its own.

    Raises:
        RuntimeError: the process failed; the message has the end of what it wrote.
    """
    here = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": here, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fakegpu.study", json.dumps(asdict(job))]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert process.stdout is not None
        try:
            yield from map(json.loads, process.stdout)
            if process.wait(limit):
                errors.seek(0)
                raise RuntimeError(f"fakegpu.study ended with {process.returncode}: {errors.read()[-2000:]}")
        finally:
            process.kill()
            process.wait()


def main(text: str) -> None:
    """Do a job, and write its rows to standard output."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no result
    from fakegpu import device

    given = json.loads(text)
    job = Job(**{**given, "pixels": tuple(given["pixels"])})
    device.load_guard()
    device.install(tuple(given.get("capability", (9, 0))))  # type: ignore[arg-type]
    for row in study(job):
        results.write(json.dumps({"job": given, **row}) + "\n")
        results.flush()


def study(job: Job) -> Iterator[dict[str, Any]]:
    """One row for loading, then one for each call."""
    import torch

    import flexclear
    from flexclear.compile import quantize
    from flexclear.compile.quantize import is_quantized, linears

    from fakegpu import host, published
    from fakegpu.launch import LAUNCHES, launching

    host.prepare()
    # Modules move fakes by exchanging them, which weak references forbid; fake mode keeps one to each, of no consequence.
    torch.utils.weakref = SimpleNamespace(getweakrefs=lambda tensor: [])  # type: ignore[attr-defined]
    with launching():
        start = time.perf_counter()
        model = published.build(job.model, job.tiny, torch.device("cpu") if job.from_cpu else host.CUDA)
        memory = host.Memory(model)
        largest = max(linear.weight.nbytes for _, linear, _ in linears(model))
        flexclear.transform(model, r=job.r)
        fp8 = False if job.precision == "bfloat16" else job.precision
        if job.from_cpu:
            # Outside fake mode, which keeps weak references to weights in eight bits, so that they cannot be exchanged.
            with torch.no_grad(), memory:
                quantize(model, fp8, device=host.CUDA)
            fp8 = False
        with host.on_paper(memory):
            flexclear.optimize(model, fp8=fp8, compile=job.compiled)
        quantized = sum(_in_eight_bits(linear) for _, linear, _ in linears(model)) if is_quantized(model) else 0
        memory.settle(model)
        yield {
            "what": "loaded",
            "weights": memory.live,
            "peak": memory.peak,
            "quantized": quantized,
            "largest": largest,
            "seconds": round(time.perf_counter() - start, 1),
        }
        calls = {pixels: _call(job, model, pixels) for pixels in job.pixels}
        order = [(pixels, what) for pixels in job.pixels for what in ("first", "second")]
        for pixels, what in [*order, *([(job.pixels[0], "back")] if len(job.pixels) > 1 else [])]:
            yield {"what": what, "pixels": pixels, **_measured(model, calls[pixels], memory)}
        if job.lora:
            for what in ("LoRA loaded", "LoRA swapped"):
                with host.on_paper():
                    _load_lora(model, hotswap=what == "LoRA swapped")
                yield {"what": what, "pixels": job.pixels[-1], **_measured(model, calls[job.pixels[-1]], memory)}
        yield {"what": "sources", "graphs": len(LAUNCHES.sources), "fallbacks": _fallbacks(LAUNCHES.sources)}


def _call(job: Job, model: Any, pixels: int) -> dict[str, Any]:
    from fakegpu import published

    side = pixels // published.PIXELS
    return published.call(job.model, model, side, side)


def _measured(model: Any, call: dict[str, Any], memory: Any) -> dict[str, Any]:
    from flexclear.compile import report

    from fakegpu.host import LOG, on_paper
    from fakegpu.launch import LAUNCHES

    memory.restart()
    LAUNCHES.restart()
    before, readings, transfers = report(), len(LOG.readings), len(LOG.transfers)
    start = time.perf_counter()
    with on_paper(memory):
        out = model(**call)[0]
    seconds = time.perf_counter() - start
    assert out.device.type == "cuda"
    assert out.shape[0] == call["hidden_states"].shape[0]
    graphs = report().since(before).graphs
    return {
        "graphs": len(graphs),
        "functions": [graph.function for graph in graphs],
        "causes": [graph.cause for graph in graphs if graph.cause],
        "readings": LOG.readings[readings:],
        "transfers": LOG.transfers[transfers:],
        "launches": sum(LAUNCHES.triton.values()),
        "products": dict(LAUNCHES.extern),
        "live": memory.live,
        "peak": memory.peak,
        "seconds": round(seconds, 1),
    }


def _in_eight_bits(linear: Any) -> bool:
    return type(linear.weight.data).__module__.startswith("torchao.")


def _load_lora(model: Any, hotswap: bool, rank: int = 16) -> None:
    """A LoRA on the attention projections, as ``pipe.load_lora_weights(..., hotswap=True)`` puts it there."""
    import torch

    from fakegpu.host import CUDA

    state = {}
    for name, module in model.named_modules():
        if name.endswith(("attn.to_q", "attn.to_k", "attn.to_v")):
            linear = getattr(module, "base_layer", module)
            place = name.replace(".base_layer", "")
            state[f"{place}.lora_A.weight"] = torch.empty(rank, linear.in_features, device=CUDA)
            state[f"{place}.lora_B.weight"] = torch.empty(linear.out_features, rank, device=CUDA)
    model.load_lora_adapter(state, prefix=None, adapter_name="style", hotswap=hotswap)


def _fallbacks(sources: list[str]) -> dict[str, int]:
    from collections import Counter

    from fakegpu.launch import fallbacks

    found: Counter[str] = Counter()
    for source in sources:
        found.update(fallbacks(source))
    return dict(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
