"""The learning-rate schedule: warm-up, flat, and a linear decay that may be decided late."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A learning-rate factor per step.

    Attributes:
        warmup: steps over which the factor rises linearly from nearly 0 to 1.
        decay_from: step at which the linear decay begins; None while the end is undecided.
        total: step at which the factor is 0 and training ends; None while the end is undecided.
    """

    warmup: int
    decay_from: int | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        if (self.decay_from is None) != (self.total is None):
            raise ValueError(f"decay_from and total are decided together, got {self.decay_from} and {self.total}")
        if self.decay_from is not None and self.total is not None and not 0 <= self.decay_from < self.total:
            raise ValueError(f"decay_from must lie before total, got {self.decay_from} and {self.total}")

    def factor(self, step: int) -> float:
        """Return the learning-rate factor, 0 to 1, of a step counted from 0."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        if self.decay_from is None or self.total is None or step < self.decay_from:
            return rising
        return rising * max(0.0, (self.total - step) / (self.total - self.decay_from))

    def finished(self, step: int) -> bool:
        """Return whether training is complete after ``step`` steps."""
        return self.total is not None and step >= self.total


def decide_end(warmup: int, done: int, total: int | None, decay_from: int | None) -> Schedule:
    """Return the schedule of a run that has done ``done`` steps and should end at ``total``, if known.

    Without ``decay_from``, the last 40 % of the steps decay, or all remaining ones if there are fewer.
    """
    if total is None:
        return Schedule(warmup)
    if total <= done:
        raise ValueError(f"total steps must be more than the {done} already done, got {total}")
    start = max(done, round(0.6 * total)) if decay_from is None else decay_from
    return Schedule(warmup, start, total)
