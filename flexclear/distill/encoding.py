"""What a run trains on: the cache that its settings name, or images that are first encoded into one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from flexclear.distill.caching import cache
from flexclear.distill.config import DistillConfig
from flexclear.distill.models import text_len_of
from flexclear.distill.processes import started
from flexclear.distill.samples import INDEX, CachedSamples
from flexclear.distill.sources import PICTURES

CACHE = "cache"
"""Folder in a run's output for the cache of its images."""


def samples_of(config: DistillConfig, say: Callable[[str], None]) -> CachedSamples:
    """The samples of ``config.data``: a cache, or images with captions, which are encoded into ``output/cache`` first.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: images cannot be encoded here: no model is named, or several processes would all do it; or see
            ``cache``.
    """
    assert config.data is not None
    if (config.data / INDEX).is_file() or not _holds_pictures(config.data):
        return CachedSamples(config.data)
    first = f"flexclear data cache {config.data} --model {config.model or 'MODEL'} --out CACHE"
    if config.model is None:
        raise ValueError(
            f"data: {config.data} holds images, but no model is named to encode them. Run {first}; then set data: CACHE"
        )
    if started() > 1:
        raise ValueError(
            f"data: {config.data} holds images, which each of {started()} processes would encode. Run {first}; then set data: "
            "CACHE"
        )
    out = config.output / CACHE
    on_cuda = config.device != "cpu" and torch.cuda.is_available()
    say(f"encoding the images of {config.data} into {out}")
    cache(
        config.data,
        config.model,
        out,
        text_len=text_len_of(config.model),
        device="cuda" if on_cuda else "cpu",
        dtype=torch.bfloat16 if on_cuda else torch.float32,
        say=say,
    )
    return CachedSamples(out)


def _holds_pictures(place: Path) -> bool:
    return place.suffix == ".tar" or any(file.suffix.lower() in (*PICTURES, ".tar") for file in place.rglob("*"))
