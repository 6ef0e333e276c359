"""What a stage changes on a pipeline, and how it is restored, also after an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from flexclear.compile.undoing import afterwards
from flexclear.convert import family_of, transform, transform_again
from flexclear.families.target import model_of
from flexclear.highres.stages import KEEP
from flexclear.masks import Downsampled, Window
from flexclear.runtime.exchange import as_before
from flexclear.runtime.hooks import entry_hook_of
from flexclear.runtime.schedule import Radii, resolve


def windows_of(pipe: Any, r: Radii | str = KEEP) -> dict[str, Window | None]:
    """The window of each attention layer under ``r``, by layer name; for ``"keep"``, the pipeline's current ones.

    Down-sampled keys stay if all layers have them with the same factor and ``r`` does not mention them.

    Raises:
        TypeError, ValueError: see ``flexclear.runtime.schedule.resolve``; or other windows for a model that shares its images
            among several ranks.
    """
    model = model_of(pipe)
    entry, layers = entry_hook_of(model), list(family_of(model).layers(model))
    own: dict[str, Window | None] = {layer.name: None for layer in layers}
    if entry is not None:
        own = dict(entry.settings.windows)
    if isinstance(r, str):
        return own
    windows = resolve(r, layers)
    factors = {window.factor if isinstance(window, Downsampled) else None for window in own.values()}
    factor = factors.pop() if len(factors) == 1 else None
    if factor is not None:
        windows = [w if w is None or isinstance(w, Downsampled) else Downsampled(w, factor) for w in windows]
    asked = {layer.name: window for layer, window in zip(layers, windows, strict=True)}
    if entry is not None and entry.parallel is not None and asked != own:
        raise ValueError(
            "r: this model shares each image among several ranks, so a stage cannot change its windows. Pass them to "
            "flexclear.transform before, and leave r out"
        )
    return asked


@contextlib.contextmanager
def windowed(pipe: Any, windows: Mapping[str, Window | None] | None, hooks: bool) -> Iterator[None]:
    """Put the pipeline's transformer under other windows inside a ``with`` block, then restore it exactly.

    Args:
        pipe: a pipeline, transformed or not.
        windows: windows by layer name; None leaves them unchanged.
        hooks: whether per-call switches are needed. A plain model does not have them, so it is transformed with dense layers.
    """
    model = model_of(pipe)
    entry = entry_hook_of(model)
    if entry is None:
        other = hooks or (windows is not None and any(windows.values()))
    else:
        own = entry.settings
        other = windows is not None and (own.formula is not None or dict(windows) != dict(own.windows))
    if not other:
        yield
        return
    # Restore the same processor objects: other windows may lack the trained pooling weights.
    with as_before(model):
        if entry is None:
            transform(pipe, windows)  # type: ignore[arg-type]
        else:
            transform_again(pipe, windows)
        yield


def shifted(scheduler: Any, shift: float | None) -> Any:
    """A scheduler with the same settings and a constant time shift; for None, an unchanged copy."""
    changed = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
    return type(scheduler).from_config(scheduler.config, **changed)


@contextlib.contextmanager
def scheduled(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Give the pipeline another scheduler inside a ``with`` block: code that counts steps looks there."""
    before = pipe.scheduler
    with afterwards(lambda: setattr(pipe, "scheduler", before)):
        pipe.scheduler = scheduler
        yield
