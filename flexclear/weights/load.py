"""``load_weights``: checks everything before it changes anything."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from flexclear.compile.undoing import undo
from flexclear.convert import transform_as
from flexclear.families import Layer, family_of
from flexclear.families.target import TRANSFORMERS, below_compile
from flexclear.masks import Disc, Downsampled, Window
from flexclear.runtime.exchange import all_or_nothing
from flexclear.runtime.hooks import EntryHook, entry_hook_of
from flexclear.runtime.schedule import resolve
from flexclear.weights import files, keys, metadata
from flexclear.weights.requantizing import Place, Plain, say_what_grew


@dataclass(frozen=True)
class LoadedWeights:
    """What ``load_weights`` did.

    Attributes:
        path: the file.
        radius: window radius in tokens; None if layers differ or the window is not a disc.
        down_factor: side of the pooled cells; None if there are none or layers differ.
        base: base model named in the file, or None.
        tensors: number of tensors loaded.
    """

    path: Path
    radius: int | None
    down_factor: int | None
    base: str | None
    tensors: int


def load_weights(
    model_or_pipe: Any,
    path: str | Path,
    *,
    filename: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> LoadedWeights:
    """Load attention projections (and pooling weights) that were trained for local attention, in place.

    The released files for FLUX.1-dev and those of ``save_weights`` fit any model with the same blocks, including schnell. The
    window that the file was trained for comes from its metadata, or from a released name such as
    ``clear_local_16.safetensors`` or ``clear_local_8_down_4.safetensors``. A model that is not transformed yet is transformed
    with it. A model with another window is transformed again with the file's, with a warning, and keeps backend, order, block
    size and switches. To use the weights under a different window, call ``transform`` after loading. If the file says nothing,
    the model keeps its window, and pooling weights in the file determine the down factor.

    >>> flexclear.load_weights(pipe, "clear_local_16.safetensors")                                  # doctest: +SKIP
    >>> flexclear.load_weights(pipe, "owner/name", filename="clear_local_8_down_4.safetensors")     # doctest: +SKIP

    Args:
        model_or_pipe: a model of a supported class, or a pipeline with one as ``transformer``; a pipeline with two needs a
            file with both.
        path: a local safetensors file; or a folder or hub id, with the file in it as ``filename``; or ``"embedded"``: the
            folder of the embedded model's distilled weights.
        filename: see ``path``.
        revision: as in ``huggingface_hub.hf_hub_download``; so are the next three.
        cache_dir: folder for downloaded files.
        token: your account's token.
        local_files_only: whether to use only files that are already downloaded.

    Values are cast to the type and device of the model's parameters and written into them, so that surrounding LoRA layers,
    compiled graphs and optimizers stay valid. Projections that torchao, GGUF or bitsandbytes keep in low precision are
    quantized again from the file's values, as if quantized after loading; other quantized layers are not touched. An error
    leaves the model as it was.

    Returns:
        What was loaded.

    Raises:
        TypeError: an unsupported model.
        FileNotFoundError, IsADirectoryError: no such file; the message lists similar ones.
        ValueError: a pickle, a damaged file, keys or shapes that do not fit, another base model, projections that are fused,
            or quantized in a way that cannot be repeated, or a file that does not say its radius and a model that is not
            transformed.

    Warns:
        UserWarning: the file was trained for another window than the model has; or projections have a GGUF type that cannot
            be written.
    """
    parts = [
        _Part(prefix, model, compiled)
        for prefix, (model, compiled) in zip(keys.prefixes(model_or_pipe), below_compile(model_or_pipe), strict=True)
    ]
    pipe = None if isinstance(model_or_pipe, nn.Module) else model_or_pipe
    file = files.locate(path, filename, revision, cache_dir, token, local_files_only)
    header = files.read_header(file, Path(filename or file).name)
    stated = metadata.read(header)
    _check_transformers(header, [part.prefix for part in parts])
    shapes = {part.prefix + name: place.shape for part in parts for name, place in part.places.items()}
    keys.check_base(header, stated.base, parts[0].model, shapes)
    for part in parts:
        part.windows = _windows(header, stated, part)
        shapes |= {part.prefix + name: shape for name, shape in keys.pooling_shapes(part.windows).items()}
    keys.check_keys(header, shapes)
    anew = [part for part in parts if not part.has_windows]
    if any(part.compiled for part in anew):
        raise ValueError(
            f"{header.path} is for a window other than that of the compiled model, or the model has none. Load weights "
            "first, then torch.compile"
        )

    if any(part.entry is not None for part in anew):
        # Warn before any change: if warnings are errors, the model stays as it was.
        warnings.warn(
            f"flexclear: {header.name} was trained for another window than the model has, so the model is transformed again "
            "with the file's. To use these weights under a window of your own, call flexclear.transform afterwards",
            stacklevel=2,
        )
    say_what_grew([place for part in parts for place in part.places.values()], stacklevel=3)
    distinct = {window for part in parts for window in part.windows.values()}
    window = distinct.pop() if len(distinct) == 1 else None
    inner = window.window if isinstance(window, Downsampled) else window
    result = LoadedWeights(
        path=file,
        radius=inner.radius if isinstance(inner, Disc) else None,
        down_factor=window.factor if isinstance(window, Downsampled) else None,
        base=stated.base,
        tensors=len(shapes),
    )
    with contextlib.ExitStack() as kept:
        for part in parts:
            kept.enter_context(all_or_nothing(part.model))
        write = kept.enter_context(_numbers_put_back_on_error())
        for part in anew:
            transform_as(part.model, part.windows, pipe)
        for part in parts:
            for name in keys.pooling_shapes(part.windows):
                weight: Any = part.model.get_submodule(name.rpartition(".")[0]).spatial_weight
                part.places[name] = Plain(name, weight)
        with safe_open(file, framework="pt") as tensors:
            for part in parts:
                for name, place in part.places.items():
                    write(part.prefix + name, place, tensors.get_tensor(part.prefix + name))
    return result


class _Part:
    """A model to load, and what is known about it before the file is read.

    Attributes:
        prefix: prefix of its names in the file.
        windows: windows that it should have.
    """

    def __init__(self, prefix: str, model: nn.Module, compiled: bool) -> None:
        self.prefix, self.model, self.compiled = prefix, model, compiled
        self.layers: list[Layer] = list(family_of(model).layers(model))
        self.places = keys.places(model, self.layers)
        self.entry: EntryHook | None = entry_hook_of(model)
        self.windows: dict[str, Window | None] = {}

    @property
    def has_windows(self) -> bool:
        """Whether the model has ``windows`` already. A formula has none, whatever its layers' windows are said to be."""
        settings = None if self.entry is None else self.entry.settings
        return settings is not None and settings.formula is None and dict(settings.windows) == self.windows

    def own(self, by_name: Mapping[Any, Any]) -> dict[Any, Any]:
        """Select this model's layers from a mapping with the names of all models."""
        others = () if self.prefix else tuple(f"{name}." for name in TRANSFORMERS[1:])
        return {
            name.removeprefix(self.prefix): said
            for name, said in by_name.items()
            if name.startswith(self.prefix) and not name.startswith(others)
        }


def _check_transformers(header: files.Header, prefixes: list[str]) -> None:
    """Raise if the file is for another transformer of a pipeline, or for more or fewer of them.

    Raises:
        ValueError: it is.
    """
    others = [f"{name}." for name in TRANSFORMERS[1:]]
    found = [prefix for prefix in others if any(key.startswith(prefix) for key in header.shapes)]
    if any(not key.startswith(tuple(others)) for key in header.shapes):
        found = ["", *found]
    if found != prefixes:
        named = [" and ".join(prefix.rstrip(".") or TRANSFORMERS[0] for prefix in each) for each in (found, prefixes)]
        raise ValueError(
            f"{header.path} holds weights of {named[0]}, but the weights of {named[1]} are wanted. Give the pipeline for a file "
            "of all its transformers, and pipe.transformer or another of them for a file of one. Nothing was changed"
        )


def _windows(header: files.Header, stated: metadata.Stated, part: _Part) -> dict[str, Window | None]:
    """The window of each layer by name: the file's, or else the model's with the file's down factor.

    Raises:
        ValueError: neither says one.
    """
    layers, entry = part.layers, part.entry
    if stated.windows is not None:
        own = part.own(stated.windows) if isinstance(stated.windows, Mapping) else stated.windows
        found = resolve(own, layers)
        return {layer.name: window for layer, window in zip(layers, found, strict=True)}
    if entry is None:
        raise ValueError(
            f"neither the metadata nor the name of {header.path} says for which radius these weights were trained, and the "
            "model is not transformed. Call flexclear.transform(model, r=...) first, or give the file its released name, such "
            "as clear_local_16.safetensors or clear_local_8_down_4.safetensors"
        )
    windows: dict[str, Window | None] = {}
    for layer in layers:
        window = entry.settings.windows[layer.name]
        window = window.window if isinstance(window, Downsampled) else window
        factor = keys.factor_of(header.shapes.get(f"{part.prefix}{layer.name}.{keys.POOLING}"))
        windows[layer.name] = window if window is None or factor is None else Downsampled(window, factor)
    return windows


@contextlib.contextmanager
def _numbers_put_back_on_error() -> Iterator[Callable[[str, Place, Tensor], None]]:
    """Yield a function that writes one tensor. If anything fails, the old values are restored."""
    written: list[tuple[Place, Any]] = []

    def write(name: str, place: Place, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} in the file holds numbers that are not finite. Nothing was changed")
        written.append((place, place.keep()))
        place.write(value)

    def put_back() -> None:
        for place, kept in written:
            place.put_back(kept)

    try:
        yield write
    except BaseException:
        undo(put_back)
        raise
