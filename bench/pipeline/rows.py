"""The rows of bench/pipeline/run.py: every variant, radius and size, timed, checked, or with the reason why not."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexclear.masks import Disc

from bench.pipeline.models import Job, Model, build
from bench.pipeline.variants import CHECK_SIDE, ERROR_BARS, Variant, cold, make_check, prepare, quantize_for, time_steps


@dataclass(frozen=True)
class Settings:
    """What to run; see ``main`` in pipeline.py. Sizes ascend."""

    model: Model
    sizes: tuple[int, ...]
    radii: tuple[int, ...]
    variants: tuple[Variant, ...]
    steps: int
    budget: float
    device: torch.device
    dtype: torch.dtype
    trained: bool
    compiled: bool
    mode: str
    backend: str

    @property
    def runs(self) -> int:
        """Number of rows."""
        return sum(len(self.sizes) * (len(self.radii) if variant.windowed else 1) for variant in self.variants)


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """A row for every variant, radius and size. What cannot run gives a row that says why, and the others go on."""
    transformer = build(settings.model, settings.device, settings.dtype, settings.trained)
    for variant in settings.variants:
        radii = settings.radii if variant.windowed else (None,)
        obstacle = variant.why_not(settings.device)
        if obstacle is not None:
            for r in radii:
                yield from (_row(settings, variant, r, size, {"why_not": obstacle}) for size in settings.sizes)
            continue
        with cold():
            for r in radii:
                yield from _measure(settings, transformer, variant, r)


def _measure(settings: Settings, transformer: nn.Module, variant: Variant, r: int | None) -> Iterator[dict[str, Any]]:
    device, jobs = settings.device, (settings.model, transformer)
    try:
        quantize_for(transformer, variant)
        small = min(*settings.sizes, CHECK_SIDE * settings.model.px_per_token)
        check = make_check(
            transformer,
            Job(*jobs, small, small, settings.steps, device, settings.dtype, seed=1),
            None if r is None else Disc(r),
        )
        prepare(transformer, variant, r, settings.compiled, settings.mode, settings.backend)
    except Exception as error:
        reason = {"why_not": _reason(error)}
        _free(device)
        yield from (_row(settings, variant, r, size, reason) for size in settings.sizes)
        return
    checked: dict[str, Any] = {}
    for size in settings.sizes:
        try:
            job = Job(*jobs, size, size, settings.steps, device, settings.dtype)
            found = time_steps(transformer, job, settings.steps, settings.budget, device)
            # After the first size, the smallest, whose graphs it shares.
            checked = checked or {"error": check.error(transformer), "unmasked": check.unmasked}
            found |= checked
        except Exception as error:
            found = {"why_not": _reason(error)}
        _free(device)
        yield _row(settings, variant, r, size, found)


def _reason(error: Exception) -> str:
    """One line of an exception, without keeping its traceback and the tensors in it."""
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{kind}: {first}".replace("|", "/")


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _row(settings: Settings, variant: Variant, r: int | None, size: int, found: dict[str, Any]) -> dict[str, Any]:
    side = size // settings.model.px_per_token
    row = {
        "variant": variant.name,
        "px": size,
        "side": side,
        "tokens": f"{side} x {side} + {settings.model.text_len}",
        "r": r,
        **dict.fromkeys(
            ("step_s", "timed_steps", "total_s", "extrapolated", "first_step_s", "compile_s", "graphs", "peak_bytes")
        ),
        "error": None,
        "unmasked": None,
        "why_not": None,
        **found,
    }
    row["wrong"] = row["error"] is not None and row["error"] > _bar(settings, variant, row["unmasked"])
    return row


def _bar(settings: Settings, variant: Variant, unmasked: float) -> float:
    """Largest error of a right variant: rounding, and well below what forgetting the mask would give."""
    bar = ERROR_BARS[settings.dtype] * (4 if variant.fp8 else 1)
    return min(bar, unmasked / 2) if variant.windowed else bar
