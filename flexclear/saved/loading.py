"""Restores saved transformed models: ``from_pretrained`` and ``transform_from_config``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flexclear.alternatives.names import named
from flexclear.common.versions import VERSION
from flexclear.convert import transform_each
from flexclear.families.target import TRANSFORMERS, models_of, names_of
from flexclear.masks.encoding import decode
from flexclear.runtime.exchange import all_or_nothing
from flexclear.runtime.stated import FORMAT, KEY, WEIGHTS

Target = TypeVar("Target")

OPTIONS = frozenset(
    {
        "backend",
        "block_size",
        "dense_steps",
        "exact_position_ids",
        "kernel_options",
        "ntk_factor",
        "order",
        "proportional_attention",
    }
)
"""Arguments of ``transform`` that are stored under their own names."""

NEWER = frozenset({"ntk_floor", "training_tokens"})
"""Arguments of only ``flexclear.override``: stored with the others, always with their defaults."""

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
"""Arguments of ``from_pretrained`` that say where on the hub something is, and how to reach it."""


@dataclass(frozen=True)
class Stated:
    """What ``config.json`` says about a transformed model.

    Attributes:
        options: arguments of ``transform``.
        weights: names of the parameters that ``transform`` adds, which are stored with the model's own.
    """

    options: Mapping[str, Any]
    weights: tuple[str, ...]


def read(config: Mapping[str, Any], where: str) -> Stated | None:
    """Read what a model's configuration says under ``KEY``; None if it has no such entry.

    Args:
        config: contents of ``config.json``.
        where: how messages name it.

    Raises:
        ValueError: it has another format, is for another class of models, or is damaged.
    """
    if KEY not in config:
        return None
    found = config[KEY]
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} has {KEY!r} that cannot be read: {found!r}")
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{where} states its window in format {found.get('format')!r}, written by flexclear {found.get('flexclear')}; "
            f"this is flexclear {VERSION}, which reads format {FORMAT}. Install that version, or load it with diffusers and "
            "call flexclear.transform"
        )
    wanted, present = found.get("model"), config.get("_class_name", found.get("model"))
    if wanted != present:
        raise ValueError(f"{where} states a window for {wanted}, but is the configuration of {present}")
    try:
        return _stated(found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{where} states a window that flexclear {VERSION} cannot read ({error}); flexclear {found.get('flexclear')} has "
            "written it"
        ) from error


def _stated(found: Mapping[str, Any]) -> Stated:
    options = {name: value for name, value in found.items() if name in OPTIONS}
    kinds = [name for name in ("attention", "window", "windows") if name in found]
    unknown = set(found) - OPTIONS - NEWER - {"format", "flexclear", "model", "weights", *kinds}
    if unknown or len(kinds) != 1:
        raise ValueError(f"unknown settings {sorted(unknown)}" if unknown else f"one window is stated as {kinds}")
    for name in ("block_size", "dense_steps"):
        if isinstance(options.get(name), list):
            options[name] = tuple(options[name])
    if "attention" in found:
        sizes = dict(found["attention"])
        options["attention"] = named(sizes.pop("kind"), **sizes)
    elif "window" in found:
        options["r"] = decode(found["window"])
    else:
        options["r"] = {name: decode(window) for name, window in found["windows"].items()}
    return Stated(options, tuple(found.get("weights", ())))


def from_pretrained(cls: type[Target], path: str | os.PathLike[str], **options: Any) -> Target:
    """``cls.from_pretrained(path, **options)`` for a model that was saved transformed, with its window and pooled weights.

    ``save_pretrained`` and ``push_to_hub`` of a transformed model or pipeline write how it was transformed into the model's
    ``config.json``. This is checked before weights are read. diffusers' own ``from_pretrained`` still loads the same folder, as
    a dense model.

    >>> pipe.save_pretrained("local")                                            # doctest: +SKIP
    >>> pipe = flexclear.from_pretrained(FluxPipeline, "local", dtype=torch.bfloat16)    # doctest: +SKIP

    Args:
        cls: a pipeline or model class of diffusers.
        path: folder or hub id.
        options: options of ``cls.from_pretrained``. A transformer among them is transformed as its own configuration says.

    Returns:
        The pipeline or the model, transformed.

    Raises:
        TypeError: ``cls`` is not such a class.
        ValueError: no window is stated there, or it has another format or is for another model; or weights that belong to it
            are missing.
    """
    if not isinstance(cls, type) or not callable(getattr(cls, "from_pretrained", None)):
        raise TypeError(
            f"expected a class of diffusers with from_pretrained, such as FluxPipeline or FluxTransformer2DModel, got {cls!r}"
        )
    for option in ("output_loading_info", "return_unused_kwargs"):
        if options.get(option):
            raise ValueError(f"{option}=True: flexclear.from_pretrained returns what was loaded and nothing else")
    hub = {name: options[name] for name in HUB if name in options}
    places = _places(cls, path, options, hub)
    if not any(places.values()):
        raise ValueError(
            f"{path} does not say how it was transformed: {_and(places)} was saved without a window. Load it with "
            f"{cls.__name__}.from_pretrained, then call flexclear.transform"
        )
    with _without_remarks_on_weights():
        loaded: Any = cls.from_pretrained(path, **options)  # type: ignore[attr-defined]
    weights = {
        name: _Checkpoint(path, name if name else options.get("subfolder"), options.get("variant"), hub)
        for name in places
        if name not in options
    }
    bare = isinstance(loaded, nn.Module)
    found = [weights.get("" if bare else name) for name in names_of(loaded)]
    _transform(
        loaded, [checkpoint or _beside(model) for checkpoint, model in zip(found, models_of(loaded), strict=True)]
    )
    return loaded


def transform_from_config(model_or_pipe: Target, path: str | os.PathLike[str] | None = None) -> Target:
    """Transform a model loaded by diffusers as its configuration says that it was saved; see ``from_pretrained``.

    >>> pipe = flexclear.transform_from_config(FluxPipeline.from_pretrained("local"))           # doctest: +SKIP

    Args:
        model_or_pipe: see ``transform``.
        path: folder of the model's weights, needed for the parameters of pooled keys, which diffusers does not load. By
            default, the folder that the model was loaded from.

    Returns:
        What was passed in.

    Raises:
        TypeError: see ``transform``.
        ValueError: the configuration states no window; see also ``from_pretrained``.

    After any exception, the model is unchanged.
    """
    models = models_of(model_or_pipe)
    if path is not None and len(models) > 1:
        raise ValueError(
            f"path is the folder of one model's weights, and this pipeline has {len(models)}. Give "
            f"{' and '.join(f'pipe.{name}' for name in names_of(model_or_pipe))} one after the other"
        )
    _transform(model_or_pipe, [_beside(model) if path is None else _Checkpoint(path) for model in models])
    return model_or_pipe


def _transform(model_or_pipe: Any, checkpoints: list[_Checkpoint]) -> None:
    """Transform models as their configurations say. A model whose configuration says nothing stays as it is, unless all do."""
    models = models_of(model_or_pipe)
    stated = [
        read(getattr(model, "config", {}), f"the configuration of this {type(model).__name__}") for model in models
    ]
    if not any(stated):
        raise ValueError(
            f"the configuration of this {type(models[0]).__name__} does not say how it was transformed: it was not saved by a "
            "transformed model. Call flexclear.transform(model, r=...)"
        )
    tensors = [
        {} if each is None else checkpoint.read(each.weights)
        for each, checkpoint in zip(stated, checkpoints, strict=True)
    ]
    with contextlib.ExitStack() as kept:
        for model in models:
            kept.enter_context(all_or_nothing(model))
        transform_each(model_or_pipe, [None if each is None else each.options for each in stated])
        for model, own in zip(models, tensors, strict=True):
            _load(model, own)


@torch.no_grad()
def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load trained values into the parameters that ``transform`` added.

    Raises:
        ValueError: they do not fit.
    """
    added = {name: one for name, one in model.named_parameters() if name.rpartition(".")[2] in WEIGHTS}
    if {name: one.shape for name, one in added.items()} != {name: one.shape for name, one in tensors.items()}:
        raise ValueError(
            f"the saved weights of pooled keys do not fit the saved window: {len(tensors)} parameters for "
            f"{len(added)}. Nothing was changed"
        )
    for name, parameter in added.items():
        parameter.copy_(tensors[name])


def _places(cls: Any, path: Any, options: Mapping[str, Any], hub: Mapping[str, Any]) -> dict[str, Stated | None]:
    """What is stated, by the name of each transformer in a pipeline's folder; for a model, the name is empty."""
    from diffusers import AutoModel, DiffusionPipeline, ModelMixin

    where = os.fspath(path)
    if issubclass(cls, ModelMixin):
        config = cls.load_config(path, subfolder=options.get("subfolder"), **hub)
        return {"": read(config, os.path.join(where, options.get("subfolder") or "", "config.json"))}
    index = DiffusionPipeline.load_config(path, **hub)
    found: dict[str, Stated | None] = {}
    for name in TRANSFORMERS:
        if isinstance(options.get(name), nn.Module):
            found[name] = read(options[name].config, f"the configuration of the {name} given")
        elif name not in options and name in index and any(index[name]):
            config = AutoModel.load_config(path, subfolder=name, **hub)
            found[name] = read(config, os.path.join(where, name, "config.json"))
    return found


def _and(places: Mapping[str, Any]) -> str:
    return " and ".join(name or "the model" for name in places) or "a pipeline without a transformer"


def _beside(model: Any) -> _Checkpoint:
    """The files that a model was loaded from, if it knows them."""
    known = getattr(model.config, "_name_or_path", None) if hasattr(model, "config") else None
    return _Checkpoint(known)


class _Checkpoint:
    """The files of a model's weights, in a folder or on the hub.

    Args:
        path: folder or hub id; None if not known.
        subfolder: the model's subfolder in it.
        variant: as in ``from_pretrained``.
        hub: how to reach the hub.
    """

    def __init__(
        self,
        path: Any,
        subfolder: str | None = None,
        variant: str | None = None,
        hub: Mapping[str, Any] | None = None,
    ) -> None:
        self._path, self._subfolder, self._variant, self._hub = path, subfolder, variant, dict(hub or {})

    def read(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Tensors by name.

        Raises:
            ValueError: the files do not contain them, or are not known.
        """
        if not names:
            return {}
        found: dict[str, Tensor] = {}
        for file in self._files(names):
            found |= _tensors(file, names)
        if missing := set(names) - set(found):
            raise ValueError(
                f"the weights of pooled keys that belong to this window are not in {self._path}: "
                f"{', '.join(sorted(missing)[:3])}{' ...' if len(missing) > 3 else ''}. Pass the folder that it was saved to: "
                "flexclear.from_pretrained(cls, folder), or flexclear.transform_from_config(model, folder)"
            )
        return found

    def _files(self, names: tuple[str, ...]) -> Iterator[Path]:
        from diffusers.utils import (
            SAFE_WEIGHTS_INDEX_NAME,
            SAFETENSORS_WEIGHTS_NAME,
            WEIGHTS_INDEX_NAME,
            WEIGHTS_NAME,
        )

        for index, single in ((SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
            listed = self._file(index)
            if listed is not None:
                with open(listed, encoding="utf-8") as stream:
                    places = json.load(stream)["weight_map"]
                for name in sorted({places[name] for name in names if name in places}):
                    if (shard := self._file(name, variant=False)) is not None:
                        yield shard
                return
            if (only := self._file(single)) is not None:
                yield only
                return

    def _file(self, name: str, variant: bool = True) -> Path | None:
        """A file by the name that diffusers gives it; None if it does not exist."""
        from diffusers.utils.hub_utils import _add_variant, _get_model_file

        if self._path is None:
            return None
        name = _add_variant(name, self._variant) if variant else name
        with contextlib.suppress(OSError):
            return Path(_get_model_file(self._path, weights_name=name, subfolder=self._subfolder, **self._hub))
        return None


def _tensors(file: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            present = set(tensors.keys())
            return {name: tensors.get_tensor(name) for name in names if name in present}
    held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name: held[name] for name in names if name in held}


class _OnlyAdded(logging.Filter):
    """Drops diffusers' message about unused weights if these are the ones that are read afterwards."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not text.startswith("Some weights of the model checkpoint at ") or " were not used " not in text:
            return True
        listed = text.rpartition("\n")[2].strip(" []'\"").split(", ")
        return not all(name.rpartition(".")[2] in WEIGHTS for name in listed)


@contextlib.contextmanager
def _without_remarks_on_weights() -> Iterator[None]:
    logger, only = logging.getLogger("diffusers.models.modeling_utils"), _OnlyAdded()
    logger.addFilter(only)
    try:
        yield
    finally:
        logger.removeFilter(only)
