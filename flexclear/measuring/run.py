"""What ``flexclear bench`` does: measure, fit rates, keep both, and report them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flexclear.compile import weight_bytes, why_not_compiled
from flexclear.explanation.work import linear_flops
from flexclear.masks import Layout
from flexclear.measuring.attention import Attention, measure_attention
from flexclear.measuring.models import Model, find_model
from flexclear.measuring.peak import peaks
from flexclear.measuring.step import Step, Variants, build, grid_of, measure_steps, peak_on_gpu
from flexclear.measuring.timing import timed
from flexclear.rates import kept
from flexclear.rates.rates import Rates, fit_windows

SMALL = (16, 16)
"""Image tokens of a layout so small that windowed attention takes hardly longer than its launch."""


TUNED_SIDE = 128
"""Largest side in tokens of the layout used for tuning kernels: larger layouts have equally full blocks."""


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        model: name or folder.
        sizes: (height, width) in pixels.
        radii: of windows, in tokens.
        device, dtype: of the tensors.
        text_len: text tokens; None: the model's.
        blocks: blocks of each kind that are run; the others are extrapolated. None: all are run.
        repeats: rounds of each measurement.
        seconds: time per size after which no further round of a measurement starts.
        compiled: whether blocks are compiled.
        memory: whether peak memory is measured.
    """

    model: str
    sizes: tuple[tuple[int, int], ...]
    radii: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    text_len: int | None = None
    blocks: int | None = 1
    repeats: int = 5
    seconds: float = 60
    compiled: bool = False
    memory: bool = True

    def check(self) -> Model:
        """Return the model; raise for what cannot be measured.

        Raises:
            ValueError: this machine or a size cannot be measured.
        """
        why_not = why_not_compiled(self.device)
        if why_not is not None:
            raise ValueError(f"windows run as compiled FlexAttention, which cannot run here: {why_not}")
        model = find_model(self.model, self.dtype, self.text_len)
        for size in self.sizes:
            if min(grid_of(size, model)) < 1:
                raise ValueError(
                    f"a token of {model.name} covers {model.px} pixels a side; got a size of {size[0]} x {size[1]}"
                )
        reach = getattr(model.transformer.config, "pos_embed_max_size", None)
        for size in self.sizes:
            if reach is not None and max(grid_of(size, model)) > reach:
                raise ValueError(f"{model.name} has positions for {reach * model.px} pixels, got {max(size)}")
        return model


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        about: hardware, versions and settings.
        rows: a dictionary for each measurement, dense ones first at each size.
        rates: rates fitted to the measurements.
        file: file that holds them; None: not kept yet.
    """

    about: dict[str, Any]
    rows: list[dict[str, Any]]
    rates: Rates
    file: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        file = None if self.file is None else str(self.file)
        return {"facts": self.about, "rows": self.rows, "rates": kept.as_json(self.rates), "file": file}


def layout_to_tune(model: Model, sizes: tuple[tuple[int, int], ...]) -> Layout:
    """Layout of the largest size up to ``TUNED_SIDE`` tokens a side, or of the smallest size if all are larger."""
    grids = sorted((grid_of(size, model) for size in sizes), key=math.prod)
    grid = next((grid for grid in reversed(grids) if max(grid) <= TUNED_SIDE), grids[0])
    return Layout(*grid, model.text_len, model.family.text_first)


def measure(job: Job, on: Callable[[str], None] = lambda what: None) -> Found:
    """Measure everything in a job; call ``on`` with what is being done.

    Raises:
        ValueError: see ``Job.check``.
        ArithmeticError: a result is wrong.
    """
    model = job.check()
    pace: dict[str, Any] = {"repeats": job.repeats, "seconds": job.seconds / 2}
    layouts = [Layout(*grid_of(size, model), model.text_len, model.family.text_first) for size in job.sizes]
    shape = (model.heads, model.head_dim, job.device, job.dtype)
    on("attention, small")
    small = Layout(*SMALL, model.text_len, model.family.text_first)
    calls = measure_attention(small, list(job.radii), *shape, **pace)
    layers: list[Attention] = []
    for size, layout in zip(job.sizes, layouts, strict=True):
        on(f"attention, {size[0]} x {size[1]} px")
        layers += measure_attention(layout, list(job.radii), *shape, **pace)
    on("linears")
    linear = _linear_rate(model, layouts, job.device, job.dtype)

    on("weights")
    variants = build(model, list(job.radii), job.device, blocks=job.blocks, compiled=job.compiled)
    steps: list[Step] = []
    memory: dict[tuple[tuple[int, int], int | None], int] = {}
    for size, layout in zip(job.sizes, layouts, strict=True):
        on(f"step, {size[0]} x {size[1]} px")
        grid = layout.height, layout.width
        # Without compiled blocks, one attention graph serves all sizes.
        warm_up = job.compiled or not steps
        steps += measure_steps(variants, grid, job.device, job.dtype, warm_up=warm_up, **pace)
        if job.memory and job.device.type == "cuda":
            found = peak_on_gpu(variants, grid, job.device, job.dtype)
            memory.update({(grid, radius): peak for radius, peak in found.items()})
    rates = fit(variants, layers, calls, steps, linear)
    if job.memory and job.device.type == "cpu":
        weights = weight_bytes(model.transformer)
        grids = [(layout.height, layout.width) for layout in layouts]
        for radius in (None, *job.radii):
            on("memory, dense" if radius is None else f"memory, r = {radius}")
            found_peaks = peaks(
                job.model, kept.name_of(job.dtype), model.text_len, job.blocks, job.compiled, grids, radius
            )
            memory.update({(grid, radius): weights + peak for grid, peak in zip(grids, found_peaks, strict=True)})
    about = {
        **kept.facts(job.device, job.dtype),
        "model": job.model,
        "heads": model.heads,
        "head_dim": model.head_dim,
        "text_len": model.text_len,
        "blocks": " + ".join(map(str, model.counts.values())),
        "blocks_run": " + ".join(map(str, variants.few_counts.values())),
        "compiled": job.compiled,
        "median_of": job.repeats,
    }
    return Found(about, _rows(job, layers, steps, memory), rates)


def keep(found: Found) -> Found:
    """Store the measurements for ``explain``."""
    file = kept.keep(found.about["model"], found.about, {"rates": kept.as_json(found.rates), "rows": found.rows})
    return Found(found.about, found.rows, found.rates, file)


def fit(variants: Variants, layers: list[Attention], calls: list[Attention], steps: list[Step], linear: float) -> Rates:
    """Fit rates to the measurements: of attention, and of everything else in the dense steps.

    Args:
        variants: the model with few blocks that made the steps.
        layers: attention at the sizes of the steps.
        calls: attention at a small size.
        steps: steps of the model with few blocks.
        linear: FLOP/s of linear layers.
    """
    dense = [one for one in layers if one.radius is None]
    windows = [(one.cost, one.median_s) for one in [*calls, *layers] if one.radius is not None]
    full, partial, call = fit_windows(windows)
    # Least squares of relative errors, for one number.
    speeds = [one.cost.dense_flops / one.median_s for one in dense]
    rate = sum(speed**2 for speed in speeds) / sum(speeds)
    model = variants.model
    layer_count = sum(1 for _ in model.family.layers(variants.few))
    token = []
    for step in steps:
        if step.radius is not None:
            continue
        own = next(one for one in dense if (one.layout.height, one.layout.width) == step.grid)
        tokens = own.layout.seq_len * own.cost.channels * layer_count
        flops = linear_flops(variants.few, model.family, own.layout.image_len, own.layout.text_len)
        token.append((step.median_s - layer_count * own.median_s - flops / linear) / tokens)
    rest = max(0.0, statistics.median(token))
    source = f"measured here with {model.name}"
    return Rates(source, rate, full, partial, linear, rest, call)


def _linear_rate(model: Model, layouts: list[Layout], device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of an MLP's two linear layers at the model's width, over the longest sequence."""
    channels = model.heads * model.head_dim
    tokens = max(layout.seq_len for layout in layouts)
    with torch.no_grad():
        x = torch.randn(tokens, channels, device=device, dtype=dtype)
        up = torch.randn(4 * channels, channels, device=device, dtype=dtype)
        down = torch.randn(channels, 4 * channels, device=device, dtype=dtype)

        def run() -> None:
            F.linear(F.linear(x, up), down)

        run()
        taken = statistics.median(timed(run, device) for _ in range(5))
    return 2 * 8 * channels**2 * tokens / taken


def _rows(
    job: Job,
    layers: list[Attention],
    steps: list[Step],
    memory: dict[tuple[tuple[int, int], int | None], int],
) -> list[dict[str, Any]]:
    rows = []
    for index, layer in enumerate(layers):
        size = job.sizes[index // (1 + len(job.radii))]
        grid = (layer.layout.height, layer.layout.width)
        step = steps[index]
        first = index - index % (1 + len(job.radii))
        dense, dense_step = layers[first], steps[first]
        rows.append(
            {
                "px": f"{size[0]} x {size[1]}",
                "tokens": f"{grid[0]} x {grid[1]} + {layer.layout.text_len}",
                "r": layer.radius,
                "blocks": None if layer.kernel is None else list(layer.kernel.block_size),
                "executed_over_useful": layer.cost.amplification,
                "attention_ms": 1e3 * layer.median_s,
                "attention_times_ms": [1e3 * one for one in layer.seconds],
                "attention_first_s": layer.first_s,
                "attention_gain": dense.median_s / layer.median_s,
                "attention_error": layer.error,
                "step_s": step.whole_s,
                "step_few_s": step.seconds,
                "block_s": step.blocks,
                "step_gain": dense_step.whole_s / step.whole_s,
                "step_error": step.error,
                "peak_bytes": memory.get((grid, layer.radius)),
            }
        )
    return rows
