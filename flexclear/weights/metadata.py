"""What a weights file says about itself: base model and windows, in its metadata or its released name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from flexclear.masks import Disc, Downsampled, Window
from flexclear.masks.encoding import decode, encode
from flexclear.runtime.schedule import Radii
from flexclear.weights.files import Header

FORMAT = "1"
"""Version of the metadata."""

RELEASED = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?\.safetensors")
"""Names of the released files: radius, and down factor if there are pooled keys."""


@dataclass(frozen=True)
class Stated:
    """What a file says about itself.

    Attributes:
        base: base model, or None.
        windows: one window for all layers, a window (or None: dense) per layer name, or None if the file does not say.
    """

    base: str | None
    windows: Radii | None


def write(windows: Mapping[str, Window | None], base: object, versions: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a file, from the windows by layer name.

    If all layers share one disc, ``r`` and ``down_factor`` describe it; everything else is in ``windows``, as JSON. ``window``
    is for people.

    Raises:
        ValueError: a window's class is not from ``flexclear.masks``.
    """
    distinct = set(windows.values())
    one = distinct.pop() if len(distinct) == 1 else None
    inner = one.window if isinstance(one, Downsampled) else one
    found = {"format": "pt", "flexclear_format": FORMAT, "window": repr(one) if one is not None else "per layer"}
    if base:
        found["base"] = str(base)  # from_pretrained records the Path that it was given
    if type(inner) is Disc:
        found["r"] = str(inner.radius)
        if isinstance(one, Downsampled):
            found["down_factor"] = str(one.factor)
    else:
        found["windows"] = json.dumps({name: encode(window, name) for name, window in windows.items()})
    return {**found, **versions}


def read(header: Header) -> Stated:
    """Read what the metadata says, or else a released name.

    Raises:
        ValueError: the metadata cannot be read.
    """
    metadata = header.metadata
    base = metadata.get("base") or None
    version = metadata.get("flexclear_format", FORMAT)
    if version != FORMAT:
        raise ValueError(
            f"{header.path} has metadata of format {version!r}; this flexclear reads {FORMAT!r}. Update it"
        )
    if "windows" in metadata:
        try:
            return Stated(base, {name: decode(window) for name, window in json.loads(metadata["windows"]).items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{header.path} has metadata 'windows' that cannot be read: {error}") from error
    if "r" in metadata:
        return Stated(base, _disc(_number(header, "r"), _number(header, "down_factor")))
    name = RELEASED.fullmatch(header.name)
    if name is not None:
        return Stated(base, _disc(int(name[1]), None if name[2] is None else int(name[2])))
    return Stated(base, None)


def _disc(r: int | None, down_factor: int | None) -> Window:
    disc = Disc(r)  # type: ignore[arg-type]
    return disc if down_factor is None else Downsampled(disc, down_factor)


def _number(header: Header, key: str) -> int | None:
    given = header.metadata.get(key)
    if given is None:
        return None
    if not given.isascii() or not given.isdigit() or int(given) < 1:
        raise ValueError(f"{header.path} has metadata {key}={given!r}; a whole number of tokens >= 1 is expected")
    return int(given)
