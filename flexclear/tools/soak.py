"""The soak test: hundreds of calls like those of a service. Memory, graphs and caches must stay bounded, images correct.

    flexclear soak --seconds 600

It uses random sizes, radii, prompts, LoRA swaps and interrupted calls on one pipeline. A fresh process draws some of the images
again; they must be the same.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexclear.common.foreign import without_diffusers_warnings
from flexclear.compile import repeated_blocks, report
from flexclear.compile.regional import GRAPHS_PER_SIZE
from flexclear.compile.report import remember_all_graphs
from flexclear.families.target import model_of, px_per_token
from flexclear.runtime.carrying import Hook
from flexclear.runtime.plan import plans
from flexclear.tools.soak_calls import (
    Call,
    Settings,
    Swapper,
    calls,
    can_swap_lora,
    load,
    perform,
    set_up,
)

MEASURE_EVERY = 4
LEAST_MEASUREMENTS = 6
ATTENTION_GRAPHS = 16
"""Graphs of attention outside compiled blocks: batch, block and grid shapes of one or more."""


@dataclass(frozen=True)
class Bounds:
    """What must hold.

    Attributes:
        growth_mib: growth of memory (resident on CPU, allocated on CUDA; without cached plans) between the first and the last
            third of the calls after warm-up, medians.
        plans_mib: size limit of the plan cache during the test.
        difference: largest difference of an image, with values from 0 to 1, from that of a fresh process. None: 0 on CPU if
            nothing is compiled, 1e-3 otherwise.
        warm_up: calls before memory counts; None: 4 for each size.
        samples: number of images that a fresh process draws again.
    """

    growth_mib: float = 16
    plans_mib: int = 2
    difference: float | None = None
    warm_up: int | None = None
    samples: int = 6


@dataclass
class SoakReport:
    """The results. ``failures`` is empty if all bounds held.

    Attributes:
        settings, bounds: those of the run.
        calls, stopped, swaps: number of calls, of interrupted calls, and of adapter swaps.
        seconds: total time.
        growth_mib: see ``Bounds``; None: too few calls to tell.
        graphs, graphs_bound: number of graphs compiled during the run, and its limit.
        plan_entries, plan_mib: most that the plan cache held.
        compared, difference: number of images compared with a fresh process, and the largest difference.
        failures: what went wrong, each with what is needed to reproduce it.
    """

    settings: Settings
    bounds: Bounds
    calls: int = 0
    stopped: int = 0
    swaps: int = 0
    seconds: float = 0.0
    growth_mib: float | None = None
    graphs: int = 0
    graphs_bound: int = 0
    plan_entries: int = 0
    plan_mib: float = 0.0
    compared: int = 0
    difference: float = 0.0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        growth = "not known" if self.growth_mib is None else f"{self.growth_mib:.1f} MiB"
        lines = [
            f"{self.calls} calls in {self.seconds:.0f} s, {self.stopped} of them interrupted, {self.swaps} LoRA swaps",
            f"memory growth after warm-up: {growth} (bound {self.bounds.growth_mib:g} MiB)",
            f"graphs: {self.graphs} (bound {self.graphs_bound})",
            f"plans cached: at most {self.plan_entries}, {self.plan_mib:.1f} MiB (bound {self.bounds.plans_mib} MiB)",
            f"images compared with a fresh process: {self.compared}, largest difference {self.difference:.1e} "
            f"(bound {self.allowed:g})",
        ]
        if self.failures:
            again = f"flexclear soak --seed {self.settings.seed} --calls {self.calls} ..."
            lines += [f"FAILURE: {failure}" for failure in self.failures]
            lines.append(f"The same calls again: {again}, other options as before")
        return "\n".join(lines)

    @property
    def allowed(self) -> float:
        """Largest allowed difference of an image from a fresh process's."""
        if self.bounds.difference is not None:
            return self.bounds.difference
        return 0.0 if self.settings.device == "cpu" and not self.settings.compile else 1e-3


@without_diffusers_warnings()
def soak_test(
    settings: Settings,
    bounds: Bounds | None = None,
    *,
    seconds: float = 60,
    max_calls: int | None = None,
    on_call: Callable[[int], None] = lambda count: None,
) -> SoakReport:
    """Run random calls and check that the bounds hold.

    Args:
        settings: which pipeline to run, and its calls.
        bounds: what must hold.
        seconds: time to run, not counting the fresh process.
        max_calls: maximum number of calls.
        on_call: called with the number of calls done.

    Returns:
        The results. An exception inside a call ends the run and is one of the failures.
    """
    bounds = bounds or Bounds()
    begun = time.monotonic()
    pipe = load(settings)
    settings = replace(settings, lora=settings.lora and can_swap_lora(pipe), threads=torch.get_num_threads())
    found = SoakReport(settings, bounds)
    held, plans.max_bytes = plans.max_bytes, bounds.plans_mib << 20
    plans.clear()
    remember_all_graphs()
    try:
        samples = _run(pipe, found, begun + seconds, max_calls, on_call)
    finally:
        plans.max_bytes = held
        plans.clear()
    if samples:
        _compare(found, samples)
    found.seconds = time.monotonic() - begun
    return found


def _run(
    pipe: Any, found: SoakReport, until: float, max_calls: int | None, on_call: Callable[[int], None]
) -> list[tuple[Call, Tensor]]:
    """Run the calls; return a random choice of them with their images."""
    settings, bounds = found.settings, found.bounds
    model, before = model_of(pipe), report()
    set_up(pipe, settings)
    hooks, swap, chooser = _hooks(model), Swapper(pipe, settings), random.Random(settings.seed)
    samples: list[tuple[Call, Tensor]] = []
    memory: list[tuple[int, float]] = []
    shapes: set[tuple[int, int, int]] = set()
    lora = None
    for call in calls(settings, px_per_token(pipe)):
        if time.monotonic() > until or call.number == max_calls:
            break
        found.swaps += call.lora != lora
        lora = call.lora
        shapes.add((call.height, call.width, call.text_len))
        try:
            picture = perform(pipe, swap, call, settings)
        except Exception as error:
            found.failures.append(f"{type(error).__name__} in {call}: {error}")
            break
        finally:
            found.calls += 1
        found.stopped += picture is None
        if picture is not None:
            if not picture.isfinite().all():
                found.failures.append(f"an image that is not finite, in {call}")
            _sample(samples, (call, picture), found.calls - found.stopped, bounds.samples, chooser)
        stats = plans.stats()
        found.plan_entries = max(found.plan_entries, stats.entries)
        found.plan_mib = max(found.plan_mib, stats.bytes / 2**20)
        if stats.bytes > stats.max_bytes and stats.entries > 1:
            found.failures.append(
                f"the plan cache holds {stats.bytes} bytes, more than {stats.max_bytes}, after {call}"
            )
            break
        if call.number % MEASURE_EVERY == 0:
            memory.append((call.number, _memory_mib(settings.device)))
        on_call(found.calls)
    if not found.failures and _hooks(model) != hooks:
        found.failures.append(f"the model had {hooks} hooks, and now has {_hooks(model)}")
    kinds = len({type(block) for block in repeated_blocks(model)})
    found.graphs = len(report().since(before).graphs)
    if settings.compile:
        found.graphs_bound = kinds * GRAPHS_PER_SIZE * len(shapes)
    else:
        found.graphs_bound = 0 if settings.backend == "sdpa" else ATTENTION_GRAPHS
    if found.graphs > found.graphs_bound:
        causes = "; ".join(sorted({graph.cause for graph in report().since(before).recompiles}))
        found.failures.append(f"{found.graphs} graphs, more than {found.graphs_bound}: {causes}")
    _judge_memory(found, memory)
    return samples


def _sample(samples: list[Any], item: Any, count: int, size: int, chooser: random.Random) -> None:
    """Keep ``size`` of all items so far with equal probability. ``item`` is number ``count``, from 1."""
    if len(samples) < size:
        samples.append(item)
    elif (place := chooser.randrange(count)) < size:
        samples[place] = item


def _hooks(model: Any) -> int:
    """Number of flexclear's hooks."""
    return sum(
        isinstance(hook, Hook)
        for module in model.modules()
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    )


def _memory_mib(device: str) -> float:
    """Memory of this process without cached plans, after garbage collection."""
    gc.collect()
    if torch.device(device).type == "cuda":
        held = torch.cuda.memory_allocated(device)
    else:
        # Freed memory that glibc retains is not growth.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held = pages * 4096
    return (held - plans.stats().bytes) / 2**20


def _judge_memory(found: SoakReport, memory: Sequence[tuple[int, float]]) -> None:
    warm_up = 4 * found.settings.sizes if found.bounds.warm_up is None else found.bounds.warm_up
    warm = [mib for number, mib in memory if number >= warm_up]
    if len(warm) < LEAST_MEASUREMENTS:
        if not found.failures:
            needed = warm_up + MEASURE_EVERY * LEAST_MEASUREMENTS
            found.failures.append(f"only {found.calls} calls: {needed} are needed to judge memory; run it longer")
        return
    third = len(warm) // 3
    found.growth_mib = statistics.median(warm[-third:]) - statistics.median(warm[:third])
    if found.growth_mib > found.bounds.growth_mib:
        curve = ", ".join(f"{mib:.0f}" for mib in warm[:: max(1, len(warm) // 12)])
        found.failures.append(
            f"memory grew by {found.growth_mib:.1f} MiB after warm-up, more than {found.bounds.growth_mib:g} (MiB: {curve})"
        )


def _compare(found: SoakReport, samples: list[tuple[Call, Tensor]]) -> None:
    """Draw the sampled images again in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        asked, made = Path(folder) / "calls.json", Path(folder) / "pictures.pt"
        asked.write_text(json.dumps({"settings": asdict(found.settings), "calls": [asdict(c) for c, _ in samples]}))
        command = [sys.executable, "-m", "flexclear.tools.soak", str(asked), str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not made.is_file():
            found.failures.append(f"the fresh process failed: {done.stderr.strip()[-500:]}")
            return
        again = torch.load(made)
    for (call, picture), other in zip(samples, again, strict=True):
        same = picture.shape == other.shape
        difference = float((picture - other).abs().max()) if same else float("inf")
        found.compared += 1
        found.difference = max(found.difference, difference)
        if not difference <= found.allowed:
            found.failures.append(f"a fresh process draws another image, by {difference:.1e}, for {call}")


@without_diffusers_warnings()
def replay(asked: Path, pictures: Path) -> None:
    """Draw the images of a file of calls, each with a newly loaded pipeline and an empty plan cache."""
    content = json.loads(asked.read_text())
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in content["settings"].items()
    }
    settings = Settings(**fields)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    made = []
    for call in content["calls"]:
        plans.clear()
        pipe = load(settings)
        set_up(pipe, settings)
        made.append(perform(pipe, Swapper(pipe, settings), Call(**call), settings))
    torch.save(made, pictures)


if __name__ == "__main__":  # what ``_compare`` starts
    replay(Path(sys.argv[1]), Path(sys.argv[2]))
