"""What a stage changes on a pipeline, and how all of it comes back, after an error too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from flexclear.convert import family_of, model_of, restore, transform, transform_again
from flexclear.highres.stages import KEEP
from flexclear.hooks import entry_hook_of, install, uninstall
from flexclear.masks import Downsampled, Window
from flexclear.schedule import Radii, resolve


def windows_of(pipe: Any, r: Radii | str = KEEP) -> dict[str, Window | None]:
    """The window of each attention layer under ``r``, by name; of the pipeline as it is for ``"keep"``.

    Down-sampled keys stay where all layers have them with one factor and ``r`` says nothing of them.

    Raises:
        TypeError, ValueError: see ``flexclear.schedule.resolve``; or other windows for a model that shares its pictures among
            several ranks.
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
            "r: this model shares each picture among several ranks, which a stage cannot change the windows of. Give them to "
            "flexclear.transform before, and leave r out"
        )
    return asked


@contextlib.contextmanager
def windowed(pipe: Any, windows: Mapping[str, Window | None] | None, hooks: bool) -> Iterator[None]:
    """The pipeline's transformer under other windows inside a ``with`` block, then exactly as it was.

    Args:
        pipe: a pipeline, transformed or not.
        windows: by layer name; None leaves them.
        hooks: whether per-call switches are needed, which a plain model does not know: it is transformed, densely.
    """
    model = model_of(pipe)
    entry = entry_hook_of(model)
    if entry is None:
        if not hooks and (windows is None or not any(windows.values())):
            yield
            return
        transform(pipe, windows if windows is not None else None)  # type: ignore[arg-type]
        try:
            yield
        finally:
            restore(pipe)
        return
    if windows is None or dict(windows) == dict(entry.settings.windows):
        yield
        return
    layers = list(entry.family.layers(model))
    processors = [layer.module.processor for layer in layers]
    try:
        transform_again(pipe, windows)
        yield
    finally:
        # The very same processors, whose trained pooling weights other windows need not have.
        uninstall(model)
        for layer, processor in zip(layers, processors, strict=True):
            layer.module.set_processor(processor)
        install(model, entry, entry.family.inner_hooks(model))


def shifted(scheduler: Any, shift: float | None) -> Any:
    """A scheduler of the same settings with a constant time shift; a copy of it as it is for None."""
    changed = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
    return type(scheduler).from_config(scheduler.config, **changed)


@contextlib.contextmanager
def scheduled(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Another scheduler on the pipeline inside a ``with`` block: what counts its steps looks there."""
    before = pipe.scheduler
    try:
        pipe.scheduler = scheduler
        yield
    finally:
        pipe.scheduler = before
