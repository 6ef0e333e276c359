"""Rates of one device, and the time of attention and of a step that they imply.

A step consists of attention, the other matrix products, and work done once per token, such as norms and the rotary embedding:

    dense layer      4 C N^2 / dense
    windowed layer   4 C (full pairs / full + partial pairs / partial) + call
    the rest         FLOPs of the linears / linear + token * N C for each layer

C is heads times head dim, and N the number of tokens. Pairs are those in the blocks that are computed: full ones and, more
slowly, partial ones, where the mask is evaluated for every pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexclear.masks import Cost

ENOUGH = 4
"""Number of measured windowed layers needed to fit rates of both kinds of blocks and the time of a call."""

LINEAR_PARAMETERS = 12
"""Parameters of a transformer layer divided by its squared width: four projections, and an MLP of four times the width."""


@dataclass(frozen=True)
class Rates:
    """How fast one device computes in one type.

    Attributes:
        source: where the numbers come from.
        dense: FLOP/s of dense attention.
        full, partial: FLOP/s of windowed attention in full and in partial blocks, counted over all pairs of a block.
        linear: FLOP/s of linear layers.
        token: seconds per token and channel of each layer for everything else; 0 where ``linear`` includes it.
        call: additional seconds per call of windowed attention.
    """

    source: str
    dense: float
    full: float
    partial: float
    linear: float
    token: float = 0.0
    call: float = 0.0

    def __str__(self) -> str:
        blocks = (
            _flops(self.full)
            if self.full == self.partial
            else f"{_flops(self.full)} in full and {_flops(self.partial)} in partial blocks"
        )
        call = f" and {_time(self.call)} a call" if self.call else ""
        token = f", the rest {1e12 * self.token:.3g} ps a token and channel" if self.token else " with the rest"
        attention = f"dense attention {_flops(self.dense)}, windows {blocks}{call}"
        return f"{self.source}: {attention}, linears {_flops(self.linear)}{token}"

    def dense_s(self, spent: Cost) -> float:
        """Seconds of a dense layer over the sequence of ``spent``."""
        return spent.dense_flops / self.dense

    def windowed_s(self, spent: Cost) -> float:
        """Seconds of a windowed layer."""
        full, partial = block_flops(spent)
        return full / self.full + partial / self.partial + self.call

    def rest_s(self, linear_flops: float, values: float) -> float:
        """Seconds of everything that is not attention.

        Args:
            linear_flops: FLOPs of the linear layers.
            values: tokens times channels, summed over layers.
        """
        return linear_flops / self.linear + values * self.token


@dataclass(frozen=True)
class Seconds:
    """The predicted times of a step.

    Attributes:
        attention: attention of all layers under their windows.
        dense: attention of all layers if they were dense.
        rest: everything else.
    """

    attention: float
    dense: float
    rest: float

    @property
    def step(self) -> float:
        """Time of the step with its windows."""
        return self.attention + self.rest

    @property
    def dense_step(self) -> float:
        """Time of the step if all layers were dense."""
        return self.dense + self.rest

    @property
    def gain(self) -> float:
        """How many times as fast a step is with windows."""
        return self.dense_step / self.step

    def __str__(self) -> str:
        return (
            f"{_time(self.step)} for {_time(self.dense_step)} dense, {self.gain:.2f} x: attention {_time(self.attention)} for "
            f"{_time(self.dense)}, the rest {_time(self.rest)}"
        )


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def _time(seconds: float) -> str:
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    number = seconds * scale
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def block_flops(spent: Cost) -> tuple[float, float]:
    """FLOPs inside full and partial blocks, counting all pairs of a block."""
    each = 4 * spent.channels * spent.executed_pairs / (spent.full + spent.partial)
    return each * spent.full, each * spent.partial


def fit_windows(points: Sequence[tuple[Cost, float]]) -> tuple[float, float, float]:
    """Fit ``full``, ``partial`` and ``call`` of ``Rates`` to measured layers, by least squares of relative errors.

    None of them is negative: if the best fit has a negative time, the best fit without that term is used, and a kind of block
    without a rate gets the other's. Fewer than ``ENOUGH`` measurements give one rate for all blocks and no time per call.

    Args:
        points: (cost, seconds) of windowed layers.

    Raises:
        ValueError: there is none, or nothing fits.
    """
    if not points:
        raise ValueError("rates of windowed attention need a measurement")
    seconds = np.array([time for _, time in points])
    terms = np.array([[*block_flops(spent), 1.0] for spent, _ in points]) / seconds[:, None]
    if len(points) < ENOUGH:
        whole = terms[:, 0] + terms[:, 1]
        rate = float((whole**2).sum() / whole.sum())
        return rate, rate, 0.0
    best: tuple[float, np.ndarray] | None = None
    for chosen in ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,)):
        found = np.zeros(3)
        scale = np.abs(terms[:, chosen]).max(0)
        if not scale.all():
            continue
        found[list(chosen)] = np.linalg.lstsq(terms[:, chosen] / scale, np.ones(len(points)), rcond=None)[0] / scale
        error = float(((terms @ found - 1) ** 2).sum())
        if (found >= 0).all() and (best is None or error < best[0] * (1 - 1e-9)):
            best = error, found
    if best is None:
        raise ValueError("no rates fit the measurements of windowed attention")
    full, partial, call = best[1]
    full, partial = full or partial, partial or full
    return 1 / full, 1 / partial, float(call)


_FLUX = "published, of an H100 in bfloat16 (flexclear bench measures this machine)"
PUBLISHED = {
    128: Rates(_FLUX, dense=640e12, full=275e12, partial=275e12, linear=590e12),
    64: Rates(_FLUX, dense=430e12, full=164e12, partial=164e12, linear=590e12),
}
"""By head dim, from bench/results/gpu.md. Attention: the fastest dense kernel (cuDNN) and ours at r = 16, 1024 to 8192 px.
``linear`` covers the rest of a step of FLUX.1-dev, including elementwise work."""


def published(head_dim: int) -> Rates:
    """The published rates of the nearest head dim."""
    return PUBLISHED[64 if head_dim <= 96 else 128]
