"""``save_weights``: the trained parameters of a transformed model in the released layout, with their window."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexclear.common.versions import VERSION
from flexclear.compile.files import whole_file
from flexclear.families import family_of
from flexclear.families.target import models_of
from flexclear.masks import Window
from flexclear.runtime.hooks import entry_hook_of
from flexclear.weights import keys, metadata
from flexclear.weights.files import SUFFIX


def save_weights(model_or_pipe: Any, path: str | Path, *, base: str | None = None) -> Path:
    """Write what training for local attention changes, projections and pooling weights, for ``load_weights``.

    Keys are those of the released files. The metadata names the base model, the windows (also per layer) and versions. The file
    is written atomically. For a model with LoRA layers, the base weights are written.

    Args:
        model_or_pipe: a transformed model, or a pipeline with one, or with two, which go into the same file.
        path: the file, ``.safetensors``; missing folders are made, an existing file is replaced.
        base: base model to name in the metadata; by default what the model was loaded from.

    Returns:
        The file.

    Raises:
        TypeError: an unsupported model.
        ValueError: the model is not transformed, or attends by a formula; a window is not from ``flexclear.masks``,
            projections are fused or quantized, or ``path`` does not end in ``.safetensors``.
    """
    from importlib.metadata import version

    from safetensors.torch import save_file

    path = Path(path).expanduser()
    if path.suffix != SUFFIX or path.is_dir():
        raise ValueError(f"path must be a file whose name ends in {SUFFIX}, got {path}")
    models = models_of(model_or_pipe)
    windows: dict[str, Window | None] = {}
    parameters: dict[str, nn.Parameter] = {}
    for prefix, model in zip(keys.prefixes(model_or_pipe), models, strict=True):
        own, trained = _of_model(model)
        windows |= {prefix + name: window for name, window in own.items()}
        parameters |= {prefix + name: parameter for name, parameter in trained.items()}
    said = metadata.write(
        windows,
        base if base is not None else getattr(getattr(models[0], "config", None), "_name_or_path", None),
        {"flexclear": VERSION, "torch": torch.__version__, "diffusers": version("diffusers")},
    )
    tensors = {name: parameter.detach().to("cpu").contiguous() for name, parameter in parameters.items()}
    with whole_file(path) as beside:
        save_file(tensors, beside, metadata=said)
    return path


def _of_model(model: nn.Module) -> tuple[Mapping[str, Window | None], dict[str, nn.Parameter]]:
    """Windows by layer name, and trained parameters by their released names.

    Raises:
        ValueError: see ``save_weights``.
    """
    layers = list(family_of(model).layers(model))
    entry = entry_hook_of(model)
    if entry is None:
        raise ValueError(
            f"this {type(model).__name__} is not transformed, so there is no window to save with its weights. "
            "Call flexclear.transform(model, r=...) first"
        )
    if entry.settings.formula is not None:
        raise ValueError(
            f"this {type(model).__name__} has attention={entry.settings.formula.kind!r}, but a weights file states windows: "
            "when loaded, it would run a different attention from the one it was trained for. Save model.state_dict(), and load "
            "it into a model that is transformed in the same way"
        )
    parameters = keys.projections(model, layers)
    for name in keys.pooling_shapes(entry.settings.windows):
        parameters[name] = model.get_submodule(name.rpartition(".")[0]).spatial_weight  # type: ignore[assignment]
    return entry.settings.windows, parameters
