"""What training reads: text embeddings and VAE moments, from a cache on disk or from memory."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flexclear.common.reading import parse_json, read_text
from flexclear.weights.files import FLOATS, read_header

CACHE_FORMAT = "flexclear-cache-1"
INDEX = "index.json"
TENSORS = ("mean", "logvar", "prompt_embeds", "pooled")


@dataclass(frozen=True)
class Sample:
    """One image or video with its caption, encoded.

    Attributes:
        mean, logvar: moments of the VAE's posterior, ``[C, h, w]``, or ``[C, F, h, w]`` for a video.
        prompt_embeds: ``[T, D]``.
        pooled: pooled text embedding, ``[P]``; None for a model that takes none.
        caption: for people.
    """

    mean: Tensor
    logvar: Tensor
    prompt_embeds: Tensor
    pooled: Tensor | None = None
    caption: str = ""


Shape = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Shapes of moments, text embeddings and pooled embedding (``()`` if there is none). Samples of a batch share them."""

Factor = float | tuple[float, ...]
"""One number, or one for each channel of the latents."""


class Samples(Protocol):
    """A sequence of samples.

    Attributes:
        scaling_factor, shift_factor: latents = (sampled from the moments - shift) * scaling, as in the VAE's
            configuration: a number, or one for each channel.
        fingerprint: that of the parts that encoded them; None if not known.
    """

    @property
    def scaling_factor(self) -> Factor: ...

    @property
    def shift_factor(self) -> Factor: ...

    @property
    def fingerprint(self) -> str | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def shape(self, index: int) -> Shape: ...


NUMBERS = {"mean": 3, "logvar": 3, "prompt_embeds": 2, "pooled": 1}
"""Dimensions of each tensor of an image's sample."""

FRAMES = {**NUMBERS, "mean": 4, "logvar": 4}
"""Dimensions of each tensor of a video's sample."""


def check_sample(sample: Sample) -> None:
    """Raise unless the tensors of a sample are as ``Sample`` says: floating-point, finite, with those dimensions.

    Raises:
        TypeError: one is not a floating-point tensor.
        ValueError: one has another shape, or holds a number that is not finite, which a VAE in float16 may produce.
    """
    for name, dimensions in (FRAMES if getattr(sample.mean, "ndim", 3) == FRAMES["mean"] else NUMBERS).items():
        tensor = getattr(sample, name)
        if name == "pooled" and tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
        _check_shape(name, tuple(tensor.shape), dimensions)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds numbers that are not finite")
    if sample.mean.shape != sample.logvar.shape:
        raise ValueError(f"mean is {list(sample.mean.shape)} and logvar {list(sample.logvar.shape)}; they must agree")


def _check_shape(name: str, shape: tuple[int, ...], dimensions: int) -> None:
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{name} must have {dimensions} dimensions, none of them 0, got {list(shape)}")


def shape_of(sample: Sample) -> Shape:
    pooled = () if sample.pooled is None else tuple(sample.pooled.shape)
    return tuple(sample.mean.shape), tuple(sample.prompt_embeds.shape), pooled


@dataclass
class MemorySamples:
    """Samples in memory.

    Raises:
        TypeError, ValueError: see ``check_sample``; the message names the sample. Or a factor is not finite, or there is not
            one factor for each channel.
    """

    samples: list[Sample]
    scaling_factor: Factor = 1.0
    shift_factor: Factor = 0.0
    fingerprint: str | None = None
    _shapes: list[Shape] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for index, sample in enumerate(self.samples):
            try:
                check_sample(sample)
            except (TypeError, ValueError) as error:
                raise type(error)(f"sample {index}: {error}") from error
        self._shapes = [shape_of(sample) for sample in self.samples]
        for name in ("scaling_factor", "shift_factor"):
            self._check_factor(name, getattr(self, name))

    def _check_factor(self, name: str, factor: Factor) -> None:
        numbers = factor if isinstance(factor, tuple) else (factor,)
        if not all(isinstance(number, float | int) and math.isfinite(number) for number in numbers):
            raise ValueError(f"{name} must be a finite number, or a tuple of one for each channel, got {factor!r}")
        for index, (latents, _, _) in enumerate(self._shapes):
            if isinstance(factor, tuple) and len(factor) != latents[0]:
                raise ValueError(f"{name} has {len(factor)} numbers, and sample {index} {latents[0]} channels")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def shape(self, index: int) -> Shape:
        return self._shapes[index]


class CachedSamples:
    """Samples from a folder that ``flexclear data cache`` wrote; tensors are read when needed.

    Raises:
        FileNotFoundError: there is no such folder, or a shard is missing.
        ValueError: it is not a finished cache, holds nothing, or a shard is damaged or lacks the types and shapes that
            the index names.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        index = self.folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(
                f"{self.folder} is not a finished cache: it has no {INDEX}, which flexclear data cache writes last"
            )
        try:
            found = parse_json(read_text(index))
            if found["format"] != CACHE_FORMAT:
                raise ValueError(f"format {found['format']!r} is not {CACHE_FORMAT!r}")
            self.model: str = found["model"]
            self.fingerprint: str | None = found["fingerprint"]
            self.scaling_factor = float(found["scaling_factor"])
            self.shift_factor = float(found["shift_factor"])
            if not math.isfinite(self.scaling_factor) or not math.isfinite(self.shift_factor):
                raise ValueError("scaling_factor and shift_factor must be finite")
            self.work: str | None = found.get("work")
            self.entries: list[dict[str, Any]] = found["samples"]
            self._shapes = [tuple(tuple(part) for part in entry["shapes"]) for entry in self.entries]
            if any(len(shape) != 3 for shape in self._shapes):
                raise ValueError("a sample must have three shapes")
            if any(not isinstance(entry[name], str) for entry in self.entries for name in ("shard", "key", "caption")):
                raise TypeError("shard, key and caption of a sample must be text")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is not the index of a cache: {error}") from error
        if not self.entries:
            raise ValueError(f"the cache {self.folder} holds no samples")
        missing = sorted(
            name for name in {entry["shard"] for entry in self.entries} if not (self.folder / name).is_file()
        )
        if missing:
            raise FileNotFoundError(f"the cache {self.folder} lacks {len(missing)} of its shards: {missing[:3]}")
        self._open = functools.lru_cache(maxsize=8)(self._opened)
        self._check_shards()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        shard = self._open(entry["shard"])
        tensors = {name: shard.get_tensor(f"{entry['key']}.{name}") for name in TENSORS}
        return Sample(**tensors, caption=entry["caption"])

    def shape(self, index: int) -> Shape:
        return self._shapes[index]  # type: ignore[return-value]

    def _check_shards(self) -> None:
        """Compare types and shapes in the shards' headers with the index, without reading tensors."""
        shards: dict[str, list[tuple[str, Any]]] = defaultdict(list)
        for entry, shapes in zip(self.entries, self._shapes, strict=True):
            shards[entry["shard"]].append((entry["key"], shapes))
        for name, samples in shards.items():
            path = self.folder / name
            try:
                header = read_header(path, name)
            except ValueError as error:
                raise ValueError(f"{path} is damaged: delete it and cache again ({error})") from error
            for sample, (latents, embeds, pooled) in samples:
                wanted = {"mean": latents, "logvar": latents, "prompt_embeds": embeds, "pooled": pooled}
                for part, shape in wanted.items():
                    key = f"{sample}.{part}"
                    if key not in header.shapes:
                        raise ValueError(f"{path} lacks {key}, which {INDEX} names. Delete the cache and make it again")
                    _check_shape(f"{path}: {key}", header.shapes[key], NUMBERS[part])
                    if header.dtypes[key] not in FLOATS or header.shapes[key] != shape:
                        raise ValueError(
                            f"{path}: {key} is {header.dtypes[key]} {list(header.shapes[key])}; it must be one of "
                            f"{list(FLOATS)} and {list(shape)}, as {INDEX} says. Delete the cache and make it again"
                        )

    def _opened(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / name, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.folder / name} is damaged: {error}. Delete it and cache again") from error


def stack(samples: Iterable[Sample]) -> dict[str, Tensor]:
    """Stack samples into tensors by name, batch dimension first. No pooled embedding if the samples have none."""
    chosen = list(samples)
    return {
        name: torch.stack([getattr(sample, name) for sample in chosen])
        for name in TENSORS
        if getattr(chosen[0], name) is not None
    }
