"""A one-line description of what was done to a model."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from flexclear.families.target import below_compile
from flexclear.masks import Window
from flexclear.runtime.facts import Settings
from flexclear.runtime.hooks import entry_hook_of
from flexclear.runtime.switches import Switches

DEFAULTS: Mapping[str, Any] = {
    "backend": "auto",
    "order": "tiled",
    "block_size": None,
    "kernel_options": (),
    "exact_position_ids": True,
    **{one.name: one.default for one in fields(Switches)},
}
"""Settings that are omitted if they have ``transform``'s default values."""


@dataclass(frozen=True)
class ModelSummary:
    """What was done to one model.

    Attributes:
        model: name of its class.
        settings: how it was transformed; None if it was not.
    """

    model: str
    settings: Settings | None

    @property
    def window(self) -> str:
        """Windows with their numbers of layers, or the formula that replaces windows."""
        if self.settings is None:
            return "not transformed"
        if self.settings.formula is not None:
            return self.settings.formula.name
        layers = Counter(_name(window) for window in self.settings.windows.values())
        if len(layers) == 1:
            return f"{next(iter(layers))} in all {layers.total()} layers"
        return ", ".join(f"{name} in {count}" for name, count in layers.items()) + f" of {layers.total()} layers"

    @property
    def others(self) -> dict[str, Any]:
        """Settings other than the window that differ from their defaults."""
        if self.settings is None:
            return {}
        found = {name: value for name, value in self.settings.options().items() if name in DEFAULTS}
        return {name: value for name, value in found.items() if value != DEFAULTS[name]}

    def __repr__(self) -> str:
        return ", ".join(
            [f"{self.model}: {self.window}", *(f"{name}={_shown(value)}" for name, value in self.others.items())]
        )


@dataclass(frozen=True)
class Summary:
    """What was done to a model or to each transformer of a pipeline; ``repr`` is one line, and notebooks show a table."""

    models: tuple[ModelSummary, ...]

    def __repr__(self) -> str:
        return "; ".join(map(repr, self.models))

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(each.model)}</th><td>{html.escape(each.window)}</td>"
            f"<td>{html.escape(', '.join(f'{name}={_shown(value)}' for name, value in each.others.items()))}</td></tr>"
            for each in self.models
        )
        return f"<table><thead><tr><th>model</th><th>window</th><th>other settings</th></tr></thead>{rows}</table>"


def _name(window: Window | None) -> str:
    return "dense" if window is None else window.name


def _shown(value: Any) -> str:
    return repr(dict(value)) if isinstance(value, tuple) and value and isinstance(value[0], tuple) else repr(value)


def summary(model_or_pipe: Any) -> Summary:
    """Summarize what ``transform`` did to a model, or to a pipeline's.

    >>> flexclear.summary(pipe)                                                 # doctest: +SKIP
    FluxTransformer2DModel: disc_r16 in all 57 layers

    Args:
        model_or_pipe: see ``transform``; may be wrapped by ``torch.compile``.

    Raises:
        TypeError: neither a model nor a pipeline with a transformer.
    """
    found = [(type(model).__name__, entry_hook_of(model)) for model, _ in below_compile(model_or_pipe)]
    return Summary(tuple(ModelSummary(name, None if entry is None else entry.settings) for name, entry in found))


def is_transformed(model_or_pipe: Any) -> bool:
    """Whether a model, or any transformer of a pipeline, is transformed.

    Args:
        model_or_pipe: see ``transform``; may be wrapped by ``torch.compile``.

    Raises:
        TypeError: neither a model nor a pipeline with a transformer.
    """
    return any(entry_hook_of(model) is not None for model, _ in below_compile(model_or_pipe))
