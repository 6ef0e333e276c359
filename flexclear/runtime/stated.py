"""How a model was transformed, as stated in the ``config.json`` next to its saved weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from flexclear.common.versions import VERSION
from flexclear.masks.encoding import encode
from flexclear.runtime.facts import Settings

KEY = "_flexclear"
"""Entry of ``config.json``. diffusers ignores entries that begin with an underscore, but keeps them in ``model.config``."""

FORMAT = 1
"""Version of its format."""

WEIGHTS = ("spatial_weight", "compression_weight")
"""Parameters that ``transform`` adds to a processor. diffusers saves them with the model's own, but does not load them."""


def state(model: nn.Module, settings: Settings) -> dict[str, Any]:
    """What to write under ``KEY``: format, versions, and the arguments of ``transform`` in JSON.

    A window that all layers share is written once, as ``window``; otherwise ``windows`` has one for each layer by name.

    Raises:
        ValueError: a window is of a user's own class, which JSON cannot hold.
    """
    options = settings.options()
    windows, formula = options.pop("windows"), options.pop("formula")
    found: dict[str, Any] = {"format": FORMAT, "flexclear": VERSION, "model": type(model).__name__}
    if formula is not None:
        found["attention"] = {"kind": formula.kind, **dataclasses.asdict(formula)}
    elif len(set(windows.values())) == 1:
        found["window"] = encode(next(iter(windows.values())), "every layer")
    else:
        found["windows"] = {name: encode(window, name) for name, window in windows.items()}
    found["kernel_options"] = dict(options.pop("kernel_options"))
    added = sorted(_added(model.named_parameters()))
    return {**found, **options, **({"weights": added} if added else {})}


def _added(parameters: Iterable[tuple[str, Any]]) -> set[str]:
    return {name for name, _ in parameters if name.rpartition(".")[2] in WEIGHTS}


def forget(model: Any) -> None:
    """Remove ``KEY`` from a model's configuration, where loading has left it."""
    config = getattr(model, "config", None)
    if config is not None and KEY in config:
        model._internal_dict = type(config)({name: value for name, value in config.items() if name != KEY})
