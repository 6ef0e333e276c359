"""``flexclear bench --tune``: blocks and kernel options tried on this machine; the fastest is kept for ``transform``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexclear.compile import tuned
from flexclear.compile.kernels import Kernel, check_kernel_options, choose
from flexclear.masks import Disc, Layout
from flexclear.measuring.attention import LARGEST_ERROR, first_call, inputs, relative_error, windowed
from flexclear.measuring.timing import timed

LEAST_GAIN = 1.02
"""Gain over the table's choice from which on another one is kept: below, it may be noise."""

BLOCKS = ((64, 64), (128, 64), (128, 128), (64, 128), (64, 32), (32, 64), (32, 32))
"""Blocks that are tried, on every device."""

TILES: tuple[tuple[tuple[int, int], int, int], ...] = (
    ((64, 64), 4, 3),
    ((64, 64), 4, 2),
    ((128, 64), 8, 3),
    ((128, 64), 4, 3),
    ((64, 128), 4, 2),
    ((64, 32), 4, 3),
    ((64, 64), 8, 2),
    ((128, 128), 8, 2),
    ((64, 64), 4, 4),
)
"""(queries, keys) of a tile, warps and stages that are tried on GPUs, with the blocks that each divides."""

CPU_HEADS = 2
"""Heads on a CPU, where time grows with them and the choice does not depend on them."""


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        kernel: blocks and options.
        seconds: of each call; empty where it did not run.
        why_not: why it did not run, or is wrong; None otherwise.
    """

    kernel: Kernel
    seconds: list[float]
    why_not: str | None = None


def candidates(device: torch.device, dtype: torch.dtype, head_dim: int, seq_len: int) -> Iterator[Kernel]:
    """The table's choice, then others by the order in which they are worth the time; what a GPU cannot take is left out."""
    default = choose(device, dtype, head_dim, seq_len=seq_len)
    yield default
    given = {default}
    tiles: tuple[Any, ...] = (None,) if device.type != "cuda" else (None, *TILES)
    for tile in tiles:
        for blocks in BLOCKS:
            options: dict[str, Any] = {}
            if tile is not None:
                (m, n), warps, stages = tile
                if blocks[0] % m or blocks[1] % n:
                    continue
                options = {"fwd_BLOCK_M": m, "fwd_BLOCK_N": n, "fwd_num_warps": warps, "fwd_num_stages": stages}
            try:
                kernel = choose(
                    device,
                    dtype,
                    head_dim,
                    seq_len=seq_len,
                    block_size=blocks,
                    options=check_kernel_options(options),
                )
            except ValueError:
                continue
            if kernel not in given:
                given.add(kernel)
                yield kernel


@torch.no_grad()
def try_kernels(
    kernels: Iterator[Kernel] | list[Kernel],
    layout: Layout,
    radius: int,
    tensors: list[Tensor],
    seconds: float,
    on: Callable[[str], None] = lambda what: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Trial]:
    """Compile, check and time kernels by turns until the time is over: half of it for first calls, the rest for rounds.

    The first kernel, what the others are compared with, always runs, and in every round.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    begun = clock()
    ready: list[tuple[Kernel, Callable[[], Tensor]]] = []
    trials: list[Trial] = []
    longest = 0.0
    for kernel in kernels:
        spent = clock() - begun
        if ready and spent + longest > seconds / 2:
            break
        on(f"r = {radius}: blocks {kernel.block_size[0]} x {kernel.block_size[1]}")
        try:
            run = windowed(layout, radius, kernel, tensors)
            _, out = first_call(run, device)
            error = relative_error(out, tensors, layout, Disc(radius))
            del out
        except Exception as failed:  # a kernel that does not fit is one candidate fewer
            if not ready:
                raise
            first = next((line for line in str(failed).splitlines() if line.strip()), "")
            trials.append(Trial(kernel, [], f"{type(failed).__name__}: {first.strip()}"))
            continue
        finally:
            longest = max(longest, clock() - begun - spent)
        if error > LARGEST_ERROR[dtype]:
            trials.append(Trial(kernel, [], f"wrong: relative error {error:.1e} to float32"))
            continue
        ready.append((kernel, run))
    times: dict[Kernel, list[float]] = {kernel: [] for kernel, _ in ready}
    rounds = 0
    while rounds < 3 or (rounds < 25 and clock() - begun < seconds):
        begun_round = clock()
        for kernel, run in ready:
            times[kernel].append(timed(run, device))
        rounds += 1
        # What is far behind after three rounds will not win.
        if rounds == 3:
            best = min(statistics.median(own) for own in times.values())
            ready = [ready[0], *(one for one in ready[1:] if statistics.median(times[one[0]]) <= 1.15 * best)]
        if rounds >= 3 and clock() - begun + (clock() - begun_round) > seconds:
            break
    return [*(Trial(kernel, own) for kernel, own in times.items()), *trials]


@dataclass(frozen=True)
class Outcome:
    """What tuning for one radius found.

    Attributes:
        radius: of the window.
        trials: all candidates that were tried; the first is the table's choice.
        best: the fastest.
        gain: how many times as fast as the first, by the median of ratios in the same rounds.
        kept: the entry that ``transform`` takes from now on; None: the table's choice stays.
    """

    radius: int
    trials: list[Trial]
    best: Trial
    gain: float
    kept: tuned.Tuned | None


def tune(
    layout: Layout,
    radius: int,
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    on: Callable[[str], None] = lambda what: None,
) -> Outcome:
    """Find the fastest blocks and kernel options for a window over ``layout``, and keep them for this machine.

    An older entry for the same is replaced, or dropped where the table's choice is as fast.
    """
    tensors = inputs(layout, heads if device.type == "cuda" else min(heads, CPU_HEADS), head_dim, device, dtype)
    trials = try_kernels(candidates(device, dtype, head_dim, layout.seq_len), layout, radius, tensors, seconds, on)
    return settle(trials, layout, radius, head_dim, device, dtype)


def settle(
    trials: list[Trial], layout: Layout, radius: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Outcome:
    """Choose among trials, and keep or drop the entry."""
    first = trials[0]

    def gain_of(trial: Trial) -> float:
        return statistics.median(base / own for base, own in zip(first.seconds, trial.seconds, strict=False))

    best = max((trial for trial in trials if trial.seconds), key=gain_of)
    gain = gain_of(best)
    place = tuned.place_of(device, dtype, head_dim, radius)
    if gain < LEAST_GAIN:
        tuned.drop(place)
        return Outcome(radius, trials, first, 1.0, None)
    entry = tuned.Tuned(
        place, best.kernel.block_size, best.kernel.options, round(gain, 3), f"{layout.height} x {layout.width}"
    )
    tuned.keep(entry)
    return Outcome(radius, trials, best, gain, entry)


def table(outcomes: list[Outcome]) -> str:
    """Markdown: every candidate of every radius, fastest first, and what is kept."""
    lines = ["| r | blocks | kernel options | ms | against the default |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        base = statistics.median(outcome.trials[0].seconds)
        ran = sorted((one for one in outcome.trials if one.seconds), key=lambda one: statistics.median(one.seconds))
        for trial in [*ran, *(one for one in outcome.trials if not one.seconds)]:
            q, kv = trial.kernel.block_size
            options = ", ".join(f"{name}={value}" for name, value in trial.kernel.options)
            options += " (the default)" if trial is outcome.trials[0] else ""
            if trial.seconds:
                taken = statistics.median(trial.seconds)
                result = f"{1e3 * taken:.4g} | {base / taken:.2f} x"
            else:
                result = f"not run | {trial.why_not}"
            lines.append(f"| {outcome.radius} | {q} x {kv} | {options.strip()} | {result} |")
    lines.append("")
    for outcome in outcomes:
        if outcome.kept is None:
            lines.append(f"r = {outcome.radius}: the default is kept")
        else:
            lines.append(f"r = {outcome.radius}: kept for transform: {outcome.kept}")
    lines.append(f"In {tuned.path()}; flexclear bench --forget deletes it.")
    return "\n".join(lines)
