"""Clocks for calls on a device, taken in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

LEAST_S = 0.01
"""Minimum seconds of one measurement on a GPU, since a short call's time would include launches."""


def timed(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call, measured over ``calls`` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    seconds: float,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time each run. Runs take turns, so that all share the same conditions. All must have been called before.

    Args:
        runs: what to call, by name.
        device: where it runs.
        repeats: rounds.
        seconds: time after which no further round starts.
        on_round: called after each round.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    calls = dict.fromkeys(runs, 1)
    begun = time.perf_counter()
    for number in range(repeats):
        for name, run in runs.items():
            if number == 0 and device.type == "cuda":
                calls[name] = max(1, min(100, int(LEAST_S / max(timed(run, device), 1e-6))))
            found[name].append(timed(run, device, calls[name]))
        on_round()
        spent = time.perf_counter() - begun
        if spent + spent / (number + 1) > seconds:
            break
    return found
