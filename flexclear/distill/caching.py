"""``flexclear data cache``: write text embeddings and VAE moments to disk, so that training loads neither encoder."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor

from flexclear.common.reading import parse_json, read_text
from flexclear.compile.files import whole_file
from flexclear.distill.models import check_encoded, fingerprint, load_pipeline, pipeline_folder, transformer_class
from flexclear.distill.samples import CACHE_FORMAT, INDEX, TENSORS, CachedSamples, Sample, check_sample, shape_of
from flexclear.distill.sources import Item, Skipped, find_items
from flexclear.generation.check import check_text_len, skeleton_of
from flexclear.images.files import write_whole
from flexclear.images.fitting import fitted


@dataclass(frozen=True)
class Part:
    """The input of one file of a cache.

    Attributes:
        name: the file's name.
        start: number of the first sample.
        items: images and captions.
        digests: digests of the images' files.
        work: describes what the cache is made from.
    """

    name: str
    start: int
    items: tuple[Item, ...]
    digests: tuple[str, ...]
    work: str


Elsewhere = Callable[[Sequence[Part]], Iterator[tuple[Part, bytes]]]
"""Encodes parts on other machines; yields each with its file's contents, in any order."""


@dataclass(frozen=True)
class Cached:
    """The result of ``cache``.

    Attributes:
        folder: the cache.
        samples: number of samples in it.
        skipped: what was left out, and why.
    """

    folder: Path
    samples: int
    skipped: tuple[Skipped, ...]


def cache(
    source: str | Path,
    model: str,
    out: str | Path,
    *,
    size: tuple[int, int] | None = None,
    text_len: int = 512,
    shard_size: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    pipe: Any = None,
    elsewhere: Elsewhere | None = None,
    on_item: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Cached:
    """Encode images and captions. A run that was stopped resumes with the first missing shard.

    Whether a cache belongs to a set of images is decided by the contents of their files, not by their names or times.

    Args:
        source: see ``find_items``.
        model: pipeline folder, hub id or ``"embedded"``.
        out: folder for shards and index.
        size: (height, width) in pixels. Every image is scaled to cover it and center-cropped. None: the image's own size,
            cropped to what the VAE takes.
        text_len: text tokens.
        shard_size: samples per file.
        device, dtype: of the encoders.
        pipe: ``model``, already loaded; otherwise it is loaded if anything is left to do.
        elsewhere: encodes what is missing, instead of ``pipe``.
        on_item: called with the number of items done and their total.
        say: called with a line for each skipped item.

    Raises:
        FileNotFoundError: no such source or model.
        OSError: an image was replaced in the meantime, or the disk is full; what is finished is kept.
        TypeError: training does not support the model.
        ValueError: there are more text tokens than the pipeline takes, there is nothing usable, or ``out`` holds a cache of
            something else.
    """
    out = Path(out).expanduser()
    folder = pipeline_folder(model)
    check_encoded(transformer_class(folder))
    whole = skeleton_of(str(folder), parse_json(read_text(folder / "model_index.json")))
    if whole is not None:
        check_text_len(whole, text_len)
    items, skipped = find_items(source)
    for out_of_use in skipped:
        say(f"skipped {out_of_use.name}: {out_of_use.reason}")
    if not items:
        raise ValueError(f"{source} holds no image with a caption ({len(skipped)} skipped)")
    made = fingerprint(folder)
    facts = {"size": size, "text_len": text_len, "shard_size": shard_size, "dtype": str(dtype), "encoders": made}
    digests = [item.digest() for item in items]
    contents = [(item.name, item.caption, digest) for item, digest in zip(items, digests, strict=True)]
    work = hashlib.sha256(json.dumps([facts, contents]).encode()).hexdigest()[:24]
    if (out / INDEX).is_file() and _work(out / INDEX) != work:
        raise ValueError(
            f"{out} holds a cache of other images, captions, settings or encoders; name another folder, or delete that one"
        )
    out.mkdir(parents=True, exist_ok=True)
    parts = [
        Part(
            f"{number:05d}.safetensors",
            start,
            tuple(items[start : start + shard_size]),
            tuple(digests[start : start + shard_size]),
            work,
        )
        for number, start in enumerate(range(0, len(items), shard_size))
    ]
    if elsewhere is not None:
        missing = [part for part in parts if _header(out / part.name, work) is None]
        done = len(items) - sum(len(part.items) for part in missing)
        on_item(done, len(items))
        for part, content in elsewhere(missing) if missing else ():
            write_whole(out / part.name, content, overwrite=True)
            done += len(part.items)
            on_item(done, len(items))
    entries: list[dict[str, Any]] = []
    factors: dict[str, float] = {}
    for part in parts:
        shard = out / part.name
        found = _header(shard, work)
        if found is None:
            if pipe is None:
                pipe = load_pipeline(model, folder, dtype, True)
            pipe.to(device)
            encode = Encoder(pipe, size, text_len)
            tensors, found = encode_part(part, encode, functools.partial(_count, on_item, part.start, len(items)))
            with whole_file(shard) as beside:
                save_file(tensors, beside, _metadata(found))
        for lost in found["skipped"]:
            skipped.append(Skipped(**lost))
            say(f"skipped {lost['name']}: {lost['reason']}")
        entries += found["samples"]
        factors = found["factors"]
        on_item(part.start + len(part.items), len(items))
    if not entries:
        raise ValueError(f"no image of {source} could be encoded; {len(skipped)} were skipped")
    index = {
        "format": CACHE_FORMAT,
        "model": model,
        "fingerprint": made,
        "work": work,
        **factors,
        **{name: value for name, value in facts.items() if name != "encoders"},
        "samples": entries,
        "skipped": [vars(lost) for lost in skipped],
    }
    with whole_file(out / INDEX) as beside:
        beside.write_text(json.dumps(index, indent=1), encoding="utf-8")
    CachedSamples(out)
    return Cached(out, len(entries), tuple(skipped))


def _count(on_item: Callable[[int, int], None], start: int, total: int, done: int) -> None:
    on_item(start + done, total)


def _work(index: Path) -> Any:
    """Read from the index of a finished cache what the cache is made from.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return parse_json(read_text(index))["work"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} is not the index of a cache: {error!r}; name another folder, or delete that one"
        ) from error


def _header(shard: Path, work: str) -> dict[str, Any] | None:
    """Return the metadata of a finished shard of the same work; None if the shard must be made."""
    from safetensors import SafetensorError, safe_open

    if not shard.is_file():
        return None
    try:
        with safe_open(shard, framework="pt") as file:
            found = parse_json((file.metadata() or {}).get("flexclear", "{}"))
    except (SafetensorError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("work") == work else None


def part_bytes(part: Part, encode: Encoder) -> bytes:
    """Make the contents of a part's file on a machine whose images may differ from the planned ones.

    Raises:
        OSError: an image has other contents here, or cannot be read.
    """
    for item, digest in zip(part.items, part.digests, strict=True):
        if item.digest() != digest:
            raise OSError(f"{item.name} is not the same image here; all machines must see the same files")
    tensors, found = encode_part(part, encode)
    return save(tensors, _metadata(found))


def _metadata(found: dict[str, Any]) -> dict[str, str]:
    return {"flexclear": json.dumps(found)}


def encode_part(
    part: Part, encode: Encoder, on_item: Callable[[int], None] = lambda done: None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a part's samples by name, and the metadata for its file."""
    tensors: dict[str, Tensor] = {}
    samples: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for place, (item, digest) in enumerate(zip(part.items, part.digests, strict=True)):
        try:
            picture = item.picture(digest)
            sample = encode(picture, item.caption)
            check_sample(sample)
        except ValueError as error:
            skipped.append({"name": item.name, "reason": str(error)})
            continue
        key = f"{part.start + place:08d}"
        tensors |= {f"{key}.{name}": getattr(sample, name).contiguous() for name in TENSORS}
        samples.append(
            {
                "shard": part.name,
                "key": key,
                "name": item.name,
                "caption": item.caption,
                "shapes": shape_of(sample),
            }
        )
        on_item(place + 1)
    return tensors, {"work": part.work, "factors": encode.factors, "samples": samples, "skipped": skipped}


class Encoder:
    """Encodes images and captions into samples with a FLUX pipeline's encoders."""

    def __init__(self, pipe: Any, size: tuple[int, int] | None, text_len: int) -> None:
        self._pipe, self._text_len = pipe, text_len
        self._multiple = pipe.vae_scale_factor * 2
        if size is not None and (size[0] % self._multiple or size[1] % self._multiple):
            raise ValueError(f"sides must be multiples of {self._multiple} pixels, got {size[0]}x{size[1]}")
        self._size = size
        config = pipe.vae.config
        self.factors = {
            "scaling_factor": float(config.scaling_factor),
            "shift_factor": float(config.shift_factor or 0),
        }

    @torch.no_grad()
    def __call__(self, picture: Image.Image, caption: str) -> Sample:
        vae = self._pipe.vae
        pixels = torch.from_numpy(np.array(fitted(picture, self._size, self._multiple))).permute(2, 0, 1)[None]
        moments = vae.encode((pixels.to(vae.device, torch.float32) / 127.5 - 1).to(vae.dtype)).latent_dist
        embeds, pooled, _ = self._pipe.encode_prompt(caption, None, max_sequence_length=self._text_len)
        return Sample(moments.mean[0].cpu(), moments.logvar[0].cpu(), embeds[0].cpu(), pooled[0].cpu(), caption)
