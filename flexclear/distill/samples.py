"""What training reads: text embeddings and VAE moments, from a cache on disk or from memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

CACHE_FORMAT = "flexclear-cache-1"
INDEX = "index.json"
TENSORS = ("mean", "logvar", "prompt_embeds", "pooled")


@dataclass(frozen=True)
class Sample:
    """One picture with its caption, encoded.

    Attributes:
        mean, logvar: moments of the VAE's posterior, ``[C, h, w]``.
        prompt_embeds: ``[T, D]``.
        pooled: pooled text embedding, ``[P]``.
        caption: for people.
    """

    mean: Tensor
    logvar: Tensor
    prompt_embeds: Tensor
    pooled: Tensor
    caption: str = ""


Shape = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Shapes of moments, text embeddings and pooled embedding. Samples of one batch share it."""


class Samples(Protocol):
    """A sequence of samples.

    Attributes:
        scaling_factor, shift_factor: latents = (drawn from the moments - shift) * scaling, as the VAE's configuration
            has them.
        fingerprint: of the parts that encoded them, or None: not known.
    """

    scaling_factor: float
    shift_factor: float
    fingerprint: str | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def shape(self, index: int) -> Shape: ...


def shape_of(sample: Sample) -> Shape:
    return tuple(sample.mean.shape), tuple(sample.prompt_embeds.shape), tuple(sample.pooled.shape)


@dataclass
class MemorySamples:
    """Samples in memory."""

    samples: list[Sample]
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    fingerprint: str | None = None
    _shapes: list[Shape] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._shapes = [shape_of(sample) for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def shape(self, index: int) -> Shape:
        return self._shapes[index]


class CachedSamples:
    """The folder that ``flexclear data cache`` writes; tensors are read when asked for.

    Raises:
        FileNotFoundError: there is no such folder, or a shard is missing.
        ValueError: it is no finished cache, or holds nothing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        index = self.folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(
                f"{self.folder} is no finished cache: it has no {INDEX}, which flexclear data cache writes last"
            )
        try:
            found = json.loads(index.read_text(encoding="utf-8"))
            if found["format"] != CACHE_FORMAT:
                raise ValueError(f"format {found['format']!r} is not {CACHE_FORMAT!r}")
            self.model: str = found["model"]
            self.fingerprint: str | None = found["fingerprint"]
            self.scaling_factor = float(found["scaling_factor"])
            self.shift_factor = float(found["shift_factor"])
            self.entries: list[dict[str, Any]] = found["samples"]
            self._shapes = [tuple(tuple(part) for part in entry["shapes"]) for entry in self.entries]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is no index of a cache: {error}") from error
        if not self.entries:
            raise ValueError(f"the cache {self.folder} holds no samples")
        missing = sorted(
            name for name in {entry["shard"] for entry in self.entries} if not (self.folder / name).is_file()
        )
        if missing:
            raise FileNotFoundError(f"the cache {self.folder} lacks {len(missing)} of its shards: {missing[:3]}")
        self._open = functools.lru_cache(maxsize=8)(self._opened)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        shard = self._open(entry["shard"])
        tensors = {name: shard.get_tensor(f"{entry['key']}.{name}") for name in TENSORS}
        return Sample(**tensors, caption=entry["caption"])

    def shape(self, index: int) -> Shape:
        return self._shapes[index]  # type: ignore[return-value]

    def _opened(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / name, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.folder / name} is damaged: {error}. Delete it and cache again") from error


def check_samples(samples: Samples, model: Any, fingerprint: str | None = None, name: str = "the data") -> None:
    """Raise unless the samples are what ``model`` takes.

    Args:
        samples: all of them.
        model: a FLUX transformer.
        fingerprint: of the pipeline's encoders, or None: not known.
        name: of the samples, for the message.

    Raises:
        ValueError: other encoders made them, or sizes do not fit; the message says which.
    """
    if not len(samples):
        raise ValueError(f"{name}: no samples")
    if fingerprint is not None and samples.fingerprint is not None and samples.fingerprint != fingerprint:
        made = getattr(samples, "model", "another model")
        raise ValueError(
            f"{name} was encoded by other encoders than the model has (by {made}; fingerprint {samples.fingerprint}, the "
            f"model's is {fingerprint}). flexclear data cache again with this model"
        )
    config = model.config
    for index in range(len(samples)):
        (channels, height, width), (_, text), (pooled,) = samples.shape(index)
        for what, given, wanted in (
            ("latent channels", channels * 4, config.in_channels),
            ("text features", text, config.joint_attention_dim),
            ("pooled features", pooled, config.pooled_projection_dim),
        ):
            if given != wanted:
                packed = " (4 x the latents' channels)" if what.startswith("latent") else ""
                raise ValueError(
                    f"{name} does not fit the {type(model).__name__}: sample {index} has {given} {what}{packed}, the model "
                    f"takes {wanted}"
                )
        if height % 2 or width % 2:
            raise ValueError(f"{name}: sample {index} has {height} x {width} latents; even sides are packed 2 x 2")


def stack(samples: Iterable[Sample]) -> dict[str, Tensor]:
    """Tensors of a batch by name, each with the batch in front."""
    chosen = list(samples)
    return {name: torch.stack([getattr(sample, name) for sample in chosen]) for name in TENSORS}
