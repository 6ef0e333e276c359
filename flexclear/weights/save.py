"""``save_weights``: the trained parameters of a transformed model in the released layout, with what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flexclear.common.versions import VERSION
from flexclear.compile.files import whole_file
from flexclear.families import family_of
from flexclear.families.target import model_of
from flexclear.runtime.hooks import entry_hook_of
from flexclear.weights import keys, metadata
from flexclear.weights.files import SUFFIX


def save_weights(model_or_pipe: Any, path: str | Path, *, base: str | None = None) -> Path:
    """Write what training for local attention changes, for ``load_weights``: projections, and pooling weights.

    Keys are those of the released files. Metadata says base model, windows (per layer too) and versions. The file
    appears whole or not at all. Of a model with LoRA layers the weights below them are written.

    Args:
        model_or_pipe: a transformed model, or a pipeline with one.
        path: the file, ``.safetensors``; folders on the way are made, a file that is there is replaced.
        base: base model to name in the metadata; what the model was loaded from otherwise.

    Returns:
        The file.

    Raises:
        TypeError: an unsupported model.
        ValueError: the model is not transformed, or to attention with a formula of its own; a window is none of
            ``flexclear.masks``, projections are fused or quantised, or ``path`` does not end in ``.safetensors``.
    """
    from importlib.metadata import version

    from safetensors.torch import save_file

    path = Path(path).expanduser()
    if path.suffix != SUFFIX or path.is_dir():
        raise ValueError(f"path must be a file whose name ends in {SUFFIX}, got {path}")
    model = model_of(model_or_pipe)
    layers = list(family_of(model).layers(model))
    entry = entry_hook_of(model)
    if entry is None:
        raise ValueError(
            f"this {type(model).__name__} is not transformed, so there is no window to save beside its weights. "
            "flexclear.transform(model, r=...) first"
        )
    if entry.settings.formula is not None:
        raise ValueError(
            f"this {type(model).__name__} has attention={entry.settings.formula.kind!r}, and a weights file states windows: "
            "loaded, it would run another attention than it was trained for. Save model.state_dict(), and load it into a "
            "model that is transformed alike"
        )
    windows = entry.settings.windows
    parameters = keys.projections(model, layers)
    for name in keys.pooling_shapes(windows):
        parameters[name] = model.get_submodule(name.rpartition(".")[0]).spatial_weight  # type: ignore[assignment]
    said = metadata.write(
        windows,
        base if base is not None else getattr(getattr(model, "config", None), "_name_or_path", None),
        {"flexclear": VERSION, "torch": torch.__version__, "diffusers": version("diffusers")},
    )
    tensors = {name: parameter.detach().to("cpu").contiguous() for name, parameter in parameters.items()}
    with whole_file(path) as beside:
        save_file(tensors, beside, metadata=said)
    return path
