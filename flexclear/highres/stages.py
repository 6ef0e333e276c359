"""Settings of each stage of a cascade: the requested ones, or the released settings of its method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexclear.runtime.schedule import Radii

BASE = "base"
"""Method of a first stage that draws from the prompt: the pipeline itself."""

KEEP = "keep"
"""Instead of a radius: the model's current windows, or dense attention if it has none."""
OWN = "own"
"""Instead of a shift: the scheduler as it is, with its dynamic shift if it has one."""

RELEASED: dict[str, dict[str, Any]] = {
    "sdedit": {
        "steps": 20,
        "strength": 0.7,
        "guidance": 7.5,
        "shift": 3.0,
        "ntk_factor": 10.0,
        "proportional_attention": True,
    },
    "imax": {
        "steps": 30,
        "strength": None,
        "guidance": 7.0,
        "shift": 6.0,
        "ntk_factor": 10.0,
        "proportional_attention": True,
    },
}
"""Settings of enlarging stages in the code released with CLEAR and with I-Max (method, section 7)."""

RELEASED_BASE: dict[str, dict[str, Any]] = {
    "sdedit": {"steps": None, "guidance": None, "shift": OWN},
    "imax": {"steps": 30, "guidance": 3.5, "shift": 3.0},
}
"""Settings of FLUX.1's first stage; None is the pipeline's own."""

_ENLARGING_ONLY = ("strength", "ntk_factor", "proportional_attention")


@dataclass(frozen=True)
class Stage:
    """One stage with all settings resolved.

    Attributes:
        number: counted from 1.
        method: ``"base"``, ``"sdedit"`` or ``"imax"``.
        height, width: in pixels.
        windows: the window's name for each attention layer; ``"dense"`` without one.
        steps: steps of the schedule, of which SDEdit runs the last ``strength``.
        strength: SDEdit's strength, else None.
        guidance: None if the model takes none.
        shift: the constant time shift; None: the scheduler as it is.
        ntk_factor, ntk_floor, proportional_attention, training_tokens: see ``flexclear.override``.
        seed: seed of the stage's noise: the cascade's plus number - 1, so that a stage does not depend on earlier runs.
    """

    number: int
    method: str
    height: int
    width: int
    windows: tuple[str, ...]
    steps: int
    strength: float | None
    guidance: float | None
    shift: float | None
    ntk_factor: float
    ntk_floor: float
    proportional_attention: bool
    training_tokens: int
    seed: int

    @property
    def switches(self) -> dict[str, Any]:
        """Arguments for ``flexclear.override``."""
        names = ("ntk_factor", "ntk_floor", "proportional_attention", "training_tokens")
        return {name: getattr(self, name) for name in names}

    def as_json(self) -> dict[str, Any]:
        """The stage as a manifest records it."""
        return {**asdict(self), "windows": list(self.windows)}


def per_stage(name: str, value: Any, stages: int, has_base: bool) -> list[Any]:
    """Return one value per stage: a sequence as it is, anything else repeated.

    Raises:
        ValueError: the sequence has another length, or sets something for the first stage that does not apply to it.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        values = [value] * stages
        return [None, *values[1:]] if has_base and name in _ENLARGING_ONLY else values
    if len(value) != stages:
        raise ValueError(f"{name} as a sequence needs one entry per size: {stages}, got {len(value)}")
    if has_base and name in _ENLARGING_ONLY and value[0] is not None:
        raise ValueError(
            f"{name} is for stages that enlarge an image; the first one draws from the prompt, so its entry must be None, "
            f"got {value[0]!r}"
        )
    return list(value)


def check_radii(r: Any, stages: int) -> list[Radii | str]:
    """Return the radius of each stage; see ``per_stage``.

    Raises:
        ValueError: the sequence has another length, or contains an unknown word.
    """
    radii = per_stage("r", r, stages, has_base=False)
    for radius in radii:
        if isinstance(radius, str) and radius != KEEP:
            raise ValueError(f"r is a radius as in transform, or {KEEP!r} for the current windows, got {radius!r}")
    return radii


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Raise for invalid steps, strength, guidance or shift of one stage. None means not chosen yet.

    Raises:
        TypeError, ValueError: one is invalid.
    """
    steps, strength = settings["steps"], settings["strength"]
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
        raise TypeError(f"steps must be a whole number, got {steps!r}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    for name in ("strength", "guidance", "shift"):
        value = settings[name]
        if value is None or (name == "shift" and value == OWN):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number" + (f" or {OWN!r}" * (name == "shift")) + f", got {value!r}")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength is the share of the steps that are run, above 0 and at most 1, got {strength!r}")
    if settings["shift"] == 0:
        raise ValueError("shift must be above 0; 1 leaves the schedule as it is")


def settings_of(method: str, is_base: bool, asked: Mapping[str, Any], follow_released_base: bool) -> dict[str, Any]:
    """One stage's settings: those requested, else the released ones, else None for the pipeline's own.

    Args:
        method: the cascade's method.
        is_base: whether the stage draws from the prompt.
        asked: the requested settings; None for those not requested.
        follow_released_base: whether the released first-stage settings apply to this model.

    Raises:
        TypeError, ValueError: see ``check_numbers``; or a strength for I-Max, which starts from noise.
    """
    check_numbers(asked)
    if method == "imax" and asked["strength"] is not None:
        raise ValueError(
            f"strength={asked['strength']!r} is for SDEdit: I-Max starts from noise. Leave it out, or use method='sdedit'"
        )
    base = RELEASED_BASE[method if follow_released_base else "sdedit"]
    defaults = base if is_base else RELEASED[method]
    return {name: defaults.get(name) if value is None else value for name, value in asked.items()}
