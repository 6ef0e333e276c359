"""What bench/pipeline/run.py compares, how one variant is set up, checked and timed."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexclear
from flexclear.compile import compile_blocks, report, uncompile, why_not_recipe
from flexclear.compile.quantize import is_quantized
from flexclear.masks import Disc, Layout, dense_mask

from bench.pipeline.models import Job

RASTER_BLOCK = 128
CHECK_SIDE = 64
"""Largest side in tokens over which a variant is checked against the dense mask."""

ERROR_BARS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative error to the model under the dense mask, in the same type."""


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        name: its label.
        windowed: whether it has a window, and is run with every radius.
        compiled: whether its blocks are compiled, unless nothing is to be.
        fp8: whether its big linears are multiplied in FP8.
        options: of ``flexclear.transform``.
    """

    name: str
    windowed: bool
    compiled: bool = True
    fp8: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device``, or None."""
        return why_not_recipe("rowwise", device) if self.fp8 else None


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("dense eager", windowed=False, compiled=False),
        Variant("dense", windowed=False),
        Variant("raster order", windowed=True, options=(("order", "raster"), ("block_size", RASTER_BLOCK))),
        Variant("flexclear", windowed=True),
        # Last: quantizing is for good.
        Variant("flexclear FP8", windowed=True, fp8=True),
    )
}


def plain(transformer: nn.Module) -> nn.Module:
    """The transformer as diffusers made it, but for quantized weights."""
    return uncompile(flexclear.restore(transformer))


def quantize_for(transformer: nn.Module, variant: Variant) -> None:
    """Put the weights into the variant's type, once and for good."""
    if variant.fp8 and not is_quantized(transformer):
        flexclear.optimize(transformer, fp8=True, compile=False)


def prepare(transformer: nn.Module, variant: Variant, r: int | None, compiled: bool, mode: str, backend: str) -> None:
    """Turn the plain transformer into ``variant`` with radius ``r``."""
    plain(transformer)
    if variant.windowed:
        flexclear.transform(transformer, r=r, backend=backend, **dict(variant.options))
    if compiled and variant.compiled:
        compile_blocks(transformer, mode=mode)


def predict_masked(transformer: nn.Module, job: Job, window: Disc | None) -> Tensor:
    """One step of diffusers' own model, eager and in raster order, with masked SDPA over the dense mask of ``window``."""
    plain(transformer)
    family = flexclear.families.family_of(transformer)
    layout = Layout(*job.grid, job.model.text_len, family.text_first, order="raster")
    mask = None if window is None else dense_mask(layout, window, device=job.latents.device)
    attend = F.scaled_dot_product_attention

    def masked(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return attend(query, key, value, **{**options, "attn_mask": mask})

    with mock.patch.object(F, "scaled_dot_product_attention", masked):
        return job.predict(transformer, job.scheduler.timesteps[0])


@dataclass(frozen=True)
class Check:
    """What a variant must give over a small grid.

    Attributes:
        job: the grid.
        expected: output of the dense-masked model of the same weights.
        unmasked: how far the model without any mask is from it, relative: what an error must be compared with.
    """

    job: Job
    expected: Tensor
    unmasked: float

    def error(self, transformer: nn.Module) -> float:
        """Relative error of the variant that ``transformer`` is now."""
        return _distance(self.job.predict(transformer, self.job.scheduler.timesteps[0]), self.expected)


def make_check(transformer: nn.Module, job: Job, window: Disc | None) -> Check:
    """Run the dense-masked model; ``transformer`` is plain afterwards."""
    expected = predict_masked(transformer, job, window)
    unmasked = 0.0 if window is None else _distance(predict_masked(transformer, job, None), expected)
    return Check(job, expected, unmasked)


def _distance(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def time_steps(transformer: nn.Module, job: Job, steps: int, budget: float, device: torch.device) -> dict[str, Any]:
    """Times of the loop: its first step apart (it compiles), then as many of ``steps`` as ``budget`` seconds allow.

    Returns:
        ``step_s``: median of the timed steps; ``timed_steps``; ``total_s``: of all steps without the first one's extra
        cost, ``extrapolated`` from the median where fewer were timed; ``first_step_s``; ``compile_s``: by torch's own
        count; ``peak_bytes``: of device memory, None on CPU.
    """

    def timed(number: int) -> float:
        start = time.perf_counter()
        job.step(transformer, number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before, begun = report(), time.perf_counter()
    first = timed(0)
    compiled = report().since(before)
    times: list[float] = []
    while len(times) < steps - 1 and (not times or time.perf_counter() - begun + times[-1] <= budget):
        times.append(timed(1 + len(times)))
    times = times or [first]
    step = statistics.median(times)
    whole = len(times) >= steps - 1
    return {
        "step_s": step,
        "timed_steps": len(times),
        "total_s": sum(times) + step if whole and steps > 1 else step * steps,
        "extrapolated": not whole,
        "first_step_s": first,
        "compile_s": compiled.seconds,
        "graphs": len(compiled.graphs),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


@contextlib.contextmanager
def cold() -> Iterator[None]:
    """Nothing compiled before is used inside, in this process or from disk."""
    from torch._inductor import utils

    torch.compiler.reset()
    fresh = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache
    with fresh():
        yield
    torch.compiler.reset()
