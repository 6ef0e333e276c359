"""What ``transform`` changes on a model: processors and hooks for some settings, replaced in one step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from flexclear.families import FAMILIES, Family, Layer
from flexclear.masks import Downsampled
from flexclear.runtime.exchange import all_or_nothing, put_hooks, put_processor, replaced_by
from flexclear.runtime.facts import Settings
from flexclear.runtime.frames import refuse_image_windows
from flexclear.runtime.hooks import EntryHook, entry_hook_of
from flexclear.runtime.modes import forget_cached_tokens
from flexclear.runtime.processors import is_ours
from flexclear.runtime.stated import WEIGHTS


class Change:
    """Processors and hooks of a model for some settings, to replace those of an earlier transform. ``make`` applies them.

    Raises:
        ValueError: the model does not support them.
    """

    def __init__(self, model: nn.Module, family: Family, layers: Sequence[Layer], settings: Settings) -> None:
        pooled = any(isinstance(window, Downsampled) for window in settings.windows.values())
        if pooled and not family.pools:
            able = ", ".join(known.model_class for known in FAMILIES if known.pools)
            raise ValueError(f"down_factor: down-sampled keys are defined for {able}, got {type(model).__name__}")
        refuse_image_windows(settings.windows.values(), family, model)
        before = entry_hook_of(model)
        self.model = model
        self.processors = [(layer.module, _processor(family, layer, settings)) for layer in layers]
        self.entry = EntryHook(family, settings, None if before is None else before.parallel)
        self.reorders = before is None or before.settings.order != settings.order
        if self.entry.parallel is not None:
            self.entry.parallel.check(model, family, settings)

    def make(self) -> None:
        """Apply the change."""
        if self.reorders:
            forget_cached_tokens(self.model)
        for module, processor in self.processors:
            put_processor(module, processor)
        put_hooks(self.model, self.entry)


def make(changes: Sequence[Change]) -> None:
    """Apply the changes to all models of a pipeline, or to none."""
    with contextlib.ExitStack() as kept:
        for change in changes:
            kept.enter_context(all_or_nothing(change.model))
        for change in changes:
            change.make()


def _processor(family: Family, layer: Layer, settings: Settings) -> Any:
    """A layer's processor for these settings, which takes over trained weights and the original from its current one."""
    present = layer.module.processor
    original = replaced_by(layer.module) if is_ours(present) else present
    window = settings.windows[layer.name]
    slot = settings.slots.index((layer.scope, window))
    factor = window.factor if isinstance(window, Downsampled) else None
    processor = family.processor(layer, original, slot, factor, settings.formula)
    _keep_trained_pooling(present, processor)
    return processor


def _keep_trained_pooling(old: Any, new: Any) -> None:
    """Keep pooling weights if a model is transformed again with the same down-sampling factor; likewise compression weights."""
    for name in WEIGHTS:
        trained, fresh = getattr(old, name, None), getattr(new, name, None)
        if trained is not None and fresh is not None and trained.shape == fresh.shape:
            setattr(new, name, trained)
