"""``flexclear bench --tune``: try blocks and kernel options on this machine, and keep the fastest for ``transform``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexclear.compile import tuned
from flexclear.compile.kernels import Kernel, check_kernel_options, choose
from flexclear.masks import Disc, Layout
from flexclear.measuring.attention import check_error, first_call, inputs, relative_error, windowed
from flexclear.measuring.timing import timed

LEAST_GAIN = 1.02
"""Smallest gain over the table's choice for which another kernel is kept. Smaller gains may be noise."""

LEAST_ROUNDS, MOST_ROUNDS = 3, 25
FAR_BEHIND = 1.15
"""Candidates this many times slower than the fastest after ``LEAST_ROUNDS`` are dropped."""

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
"""(queries, keys) of a tile, warps and stages to try on GPUs, with the blocks that each tile divides."""

CPU_HEADS = 2
"""Heads to use on a CPU, where time grows with them but the choice does not depend on them."""


@dataclass(frozen=True)
class Trial:
    """One candidate for one radius.

    Attributes:
        kernel: blocks and options.
        seconds: time of each call; fewer than others' if it was dropped, none if it did not run.
        why_not: why it did not run, or how it is wrong; None otherwise.
    """

    kernel: Kernel
    seconds: list[float]
    why_not: str | None = None


def candidates(
    device: torch.device, dtype: torch.dtype, head_dim: int, seq_len: int, defaults: list[Kernel]
) -> Iterator[Kernel]:
    """The table's choices, then others, most promising first; without those that the GPU does not support."""
    given = dict.fromkeys(defaults)
    yield from given
    tiles: tuple[Any, ...] = (None,) if device.type != "cuda" else (None, *TILES)
    for tile in tiles:
        for blocks in BLOCKS:
            options: dict[str, Any] = {}
            if tile is not None:
                (m, n), warps, stages = tile
                if blocks[0] % m or blocks[1] % n:
                    continue
                options = {"fwd_BLOCK_M": m, "fwd_BLOCK_N": n, "fwd_num_warps": warps, "fwd_num_stages": stages}
            checked = check_kernel_options(options)
            try:
                kernel = choose(device, dtype, head_dim, seq_len=seq_len, block_size=blocks, options=checked)
            except ValueError:
                continue
            if kernel not in given:
                given[kernel] = None
                yield kernel


@torch.no_grad()
def try_kernels(
    kernels: Iterable[Kernel],
    defaults: Mapping[int, Kernel],
    layout: Layout,
    tensors: list[Tensor],
    seconds: float,
    on: Callable[[str], None] = lambda what: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, list[Trial]]:
    """Compile, check and time kernels in turn until time runs out. All radii share compiled kernels.

    Two thirds of the time are for first calls, the rest for rounds. After three rounds, kernels that are far behind are
    dropped.

    Args:
        kernels: candidates, starting with those of ``defaults``, which always run and take part in every round.
        defaults: kernels to compare the others with, by radius.
        layout: the sequence.
        tensors: query, key and value.
        seconds: time for everything.
        on: called with what is being tried.
        clock: seconds.

    Returns:
        Trials by radius, the default's first.
    """
    device = tensors[0].device
    begun, longest = clock(), 0.0
    ready: dict[tuple[int, Kernel], Callable[[], Tensor]] = {}
    failed: dict[int, list[Trial]] = {radius: [] for radius in defaults}
    for kernel in kernels:
        needed, spent = kernel in defaults.values(), clock() - begun
        if not needed and spent + longest > 2 / 3 * seconds:
            break
        on(f"blocks {kernel.block_size[0]} x {kernel.block_size[1]}")
        for radius, default in defaults.items():
            try:
                run = windowed(layout, radius, kernel, tensors)
                _check(run, layout, radius, tensors)
            except Exception as error:  # a kernel that does not fit is just one candidate fewer
                if kernel == default:
                    raise
                first = next((line for line in str(error).splitlines() if line.strip()), "")
                failed[radius].append(Trial(kernel, [], f"{type(error).__name__}: {first.strip()}"))
                continue
            ready[radius, kernel] = run
        if spent:  # the very first also has imports and the like
            longest = max(longest, clock() - begun - spent)
    times: dict[tuple[int, Kernel], list[float]] = {one: [] for one in ready}
    for number in range(MOST_ROUNDS):
        begun_round = clock()
        for one, run in ready.items():
            times[one].append(timed(run, device))
        if number == LEAST_ROUNDS - 1:
            ready = _in_sight(ready, times, defaults)
        if number >= LEAST_ROUNDS - 1 and 2 * clock() - begun - begun_round > seconds:
            break
    return {
        radius: sorted(
            (Trial(kernel, own) for (for_radius, kernel), own in times.items() if for_radius == radius),
            key=lambda trial: trial.kernel != default,
        )
        + failed[radius]
        for radius, default in defaults.items()
    }


def _check(run: Callable[[], Tensor], layout: Layout, radius: int, tensors: list[Tensor]) -> None:
    """Raise if what ``run`` returns is wrong.

    Raises:
        ArithmeticError: it is wrong.
    """
    _, out = first_call(run, tensors[0].device)
    check_error(relative_error(out, tensors, layout, Disc(radius)), tensors[0].dtype, f"attention, r = {radius},")


def _in_sight(
    ready: dict[tuple[int, Kernel], Callable[[], Tensor]],
    times: dict[tuple[int, Kernel], list[float]],
    defaults: Mapping[int, Kernel],
) -> dict[tuple[int, Kernel], Callable[[], Tensor]]:
    """The runs that may still win, and the defaults."""
    best = {
        radius: min(statistics.median(own) for (for_radius, _), own in times.items() if for_radius == radius)
        for radius in defaults
    }
    return {
        (radius, kernel): run
        for (radius, kernel), run in ready.items()
        if kernel == defaults[radius] or statistics.median(times[radius, kernel]) <= FAR_BEHIND * best[radius]
    }


@dataclass(frozen=True)
class Outcome:
    """What tuning for one radius found.

    Attributes:
        radius: of the window.
        trials: all candidates that were tried; the first is the table's choice.
        gain: how many times as fast as that the best one is, by the median of ratios within rounds.
        kept: the entry that ``transform`` uses from now on; None: the table's choice stays.
    """

    radius: int
    trials: list[Trial]
    gain: float
    kept: tuned.Tuned | None


def tune(
    layout: Layout,
    radii: tuple[int, ...],
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    on: Callable[[str], None] = lambda what: None,
) -> list[Outcome]:
    """Find the fastest blocks and kernel options for windows over ``layout``, and keep them for this machine.

    An older entry for the same case is replaced, or dropped if the table's choice is as fast.
    """
    tensors = inputs(layout, heads if device.type == "cuda" else min(heads, CPU_HEADS), head_dim, device, dtype)
    defaults = {radius: choose(device, dtype, head_dim, reach=radius, seq_len=layout.seq_len) for radius in radii}
    tried = candidates(device, dtype, head_dim, layout.seq_len, list(defaults.values()))
    found = try_kernels(tried, defaults, layout, tensors, seconds, on)
    return [settle(trials, layout, radius, head_dim, device, dtype) for radius, trials in found.items()]


def settle(
    trials: list[Trial], layout: Layout, radius: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Outcome:
    """Choose among trials, the first of which is the table's, and keep or drop the entry.

    To win, a trial must be in every round, and faster than the table's choice in three of four rounds: on a shared machine, the
    median alone may be luck.
    """
    first = trials[0]
    whole = [trial for trial in trials if len(trial.seconds) == len(first.seconds)]
    best = max(whole, key=lambda trial: ratio(first, trial))
    gain = ratio(first, best)
    place = tuned.place_of(device, dtype, head_dim, radius)
    if gain < LEAST_GAIN or ratio(first, best, 0.25) <= 1:
        tuned.drop(place)
        return Outcome(radius, trials, 1.0, None)
    tokens = f"{layout.height} x {layout.width}"
    entry = tuned.Tuned(place, best.kernel.block_size, best.kernel.options, round(gain, 3), tokens)
    tuned.keep(entry)
    return Outcome(radius, trials, gain, entry)


def ratio(first: Trial, other: Trial, quantile: float = 0.5) -> float:
    """How many times as fast ``other`` was in the same rounds: a quantile of the ratios."""
    found = [base / own for base, own in zip(first.seconds, other.seconds, strict=False)]
    return float(torch.tensor(found, dtype=torch.float64).quantile(quantile))


def table(outcomes: list[Outcome]) -> str:
    """Markdown: every candidate of every radius, fastest first, and what is kept."""
    lines = ["| r | blocks | kernel options | ms | rounds | against the default |", "|---|---|---|---|---|---|"]
    for outcome in outcomes:
        first = outcome.trials[0]
        ran = sorted((one for one in outcome.trials if one.seconds), key=lambda one: -ratio(first, one))
        for trial in [*ran, *(one for one in outcome.trials if not one.seconds)]:
            q, kv = trial.kernel.block_size
            options = ", ".join(f"{name}={value}" for name, value in trial.kernel.options)
            options += " (the default)" if trial is first else ""
            result = f"not run |  | {trial.why_not}"
            if trial.seconds:
                taken = 1e3 * statistics.median(trial.seconds)
                result = f"{taken:.4g} | {len(trial.seconds)} | {ratio(first, trial):.2f} x"
            lines.append(f"| {outcome.radius} | {q} x {kv} | {options.strip()} | {result} |")
    lines.append("")
    for outcome in outcomes:
        if outcome.kept is None:
            lines.append(f"r = {outcome.radius}: the default is kept.")
        else:
            lines.append(f"r = {outcome.radius}: kept for transform: {outcome.kept}.")
    lines.append(f"In {tuned.path()}; flexclear bench --forget deletes it.")
    return "\n".join(lines)
