"""One step of a transformer with random weights and few blocks, dense and windowed in turn; the rest is extrapolated."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.compile import compile_blocks, weight_bytes
from flexclear.convert import transform
from flexclear.measuring.models import Model, call_of, few_blocks, with_random_weights
from flexclear.measuring.timing import in_turns
from flexclear.runtime.family import blocks_of

CHECKED = 64
"""Largest side in tokens at which a windowed step is compared with masked SDPA."""

LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative errors from which on a step counts as wrong. Forgetting the window gives several tenths."""


@dataclass(frozen=True)
class Step:
    """A step, timed.

    Attributes:
        grid: rows and columns of image tokens.
        radius: the windows' radius; None: dense.
        seconds: time of each step of the model with few blocks.
        blocks: median seconds of a block, by stack.
        whole_s: time of a step of the whole model: the median step plus a block's median for each omitted block.
        error: relative to the same model under masked SDPA; None if it was not compared.
    """

    grid: tuple[int, int]
    radius: int | None
    seconds: list[float]
    blocks: dict[str, float]
    whole_s: float
    error: float | None

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


class _Clock:
    """Hooks of a block that record how long its calls take, without synchronizing the GPU.

    They run around the block, and around its graph if it is compiled.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.starts: list[Any] = []
        self.ends: list[Any] = []

    def before(self, *call: Any) -> None:
        self.starts.append(self._mark())

    def after(self, *call: Any) -> None:
        self.ends.append(self._mark())

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        """Seconds of each call. The GPU must have finished its work."""
        marks = zip(self.starts, self.ends, strict=True)
        if self.device.type == "cuda":
            return [start.elapsed_time(end) / 1000 for start, end in marks]
        return [end - start for start, end in marks]


@dataclass
class Variants:
    """A model with few blocks in several variants that share its weights: dense, and transformed by radius.

    Attributes:
        model: the model that they are made from.
        few: the dense one.
        by_radius: all variants by radius; None: dense.
    """

    model: Model
    few: nn.Module
    by_radius: dict[int | None, nn.Module] = field(default_factory=dict)

    @property
    def few_counts(self) -> dict[str, int]:
        """Number of blocks present, by stack."""
        return {path: len(blocks_of(self.few, path)) for path in self.model.family.stacks}

    @property
    def left_out_bytes(self) -> int:
        """Bytes of the omitted blocks' weights."""
        return weight_bytes(self.model.transformer) - weight_bytes(self.few)


def build(
    model: Model,
    radii: list[int],
    device: torch.device,
    *,
    blocks: int | None,
    compiled: bool,
    dense: bool = True,
) -> Variants:
    """Build the variants, with random weights on ``device`` and at most ``blocks`` blocks of each kind."""
    few = with_random_weights(few_blocks(model, blocks), device)
    found = Variants(model, few)
    for radius in [*([None] if dense else []), *radii]:
        one = _sharing(few)
        if radius is not None:
            transform(one, r=radius, backend="flex")
        if compiled:
            compile_blocks(one)
        found.by_radius[radius] = one
    return found


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that shares its tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@contextmanager
def clocks(model: nn.Module, paths: Iterable[str], device: torch.device) -> Iterator[dict[str, list[_Clock]]]:
    """Time the blocks of these stacks inside the ``with`` block."""
    found: dict[str, list[_Clock]] = {}
    with ExitStack() as hooks:
        for path in paths:
            found[path] = []
            for block in blocks_of(model, path):
                clock = _Clock(device)
                hooks.callback(block.register_forward_pre_hook(clock.before, prepend=True).remove)
                hooks.callback(block.register_forward_hook(clock.after).remove)
                found[path].append(clock)
        yield found


@torch.no_grad()
def measure_steps(
    variants: Variants,
    grid: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int,
    seconds: float,
    warm_up: bool = True,
) -> list[Step]:
    """Measure a step of each variant over ``grid``. Up to ``CHECKED`` tokens a side, compare it with masked SDPA first.

    Args:
        variants: what to run.
        grid: rows and columns of image tokens.
        device, dtype: those of the call.
        repeats, seconds: see ``in_turns``.
        warm_up: whether something may be compiled for this size, or for the first one.

    Raises:
        ArithmeticError: a windowed step is wrong.
    """
    model = variants.model
    arguments = call_of(model, grid, device, dtype)
    errors: dict[int | None, float | None] = dict.fromkeys(variants.by_radius)
    checked = max(grid) <= CHECKED
    for radius, one in variants.by_radius.items():
        if not warm_up and not checked:
            continue
        out = one(**arguments)[0]
        if radius is not None and checked:
            errors[radius] = _error(variants.few, radius, arguments, out)
            if not errors[radius] <= LARGEST_ERROR[dtype]:  # type: ignore[operator]
                raise ArithmeticError(
                    f"a step with r = {radius} is wrong here: relative error {errors[radius]:.1e} to masked SDPA"
                )
        del out
    runs = {str(radius): (lambda one=one: one(**arguments)) for radius, one in variants.by_radius.items()}
    left_out = {path: model.counts[path] - count for path, count in variants.few_counts.items()}
    with ExitStack() as stack:
        timing = {
            radius: stack.enter_context(clocks(one, left_out, device)) for radius, one in variants.by_radius.items()
        }
        times = in_turns(runs, device, repeats, seconds)
    found = []
    for radius in variants.by_radius:
        own = times[str(radius)]
        blocks = {
            path: statistics.median(taken for clock in of_stack for taken in clock.seconds())
            for path, of_stack in timing[radius].items()
            if of_stack
        }
        more = sum(left_out[path] * taken for path, taken in blocks.items())
        found.append(Step(grid, radius, own, blocks, statistics.median(own) + more, errors[radius]))
    return found


def _error(few: nn.Module, radius: int, arguments: dict[str, Any], out: Tensor) -> float:
    """Relative error of a step's output, compared with masked SDPA."""
    plain = _sharing(few)
    expected = transform(plain, r=radius, backend="sdpa")(**arguments)[0].float()
    return float((out.float() - expected).norm() / expected.norm())


def peak_on_gpu(variants: Variants, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> dict[Any, int]:
    """Peak bytes of GPU memory of a step by radius, including the weights of all blocks."""
    arguments = call_of(variants.model, grid, device, dtype)
    found = {}
    for radius, one in variants.by_radius.items():
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            one(**arguments)
        torch.cuda.synchronize(device)
        found[radius] = torch.cuda.max_memory_allocated(device) + variants.left_out_bytes
    return found


def grid_of(px: tuple[int, int], model: Model) -> tuple[int, int]:
    """Rows and columns of image tokens for a size (height, width) in pixels."""
    return px[0] // model.px, px[1] // model.px
