"""Windows as JSON values, for the metadata of files."""

from __future__ import annotations

import dataclasses
from typing import Any

from flexclear.masks.downsampled import Downsampled
from flexclear.masks.neighborhoods import Neighborhood, Square
from flexclear.masks.shapes import Disc, Full, Strided, Swin
from flexclear.masks.tiles import Anchors, TileWindow
from flexclear.masks.tubes import Tube
from flexclear.masks.windows import Both, Either, Window

PLAIN = {kind.__name__: kind for kind in (Disc, Square, Neighborhood, Swin, Strided, Full, Tube, TileWindow, Anchors)}
COMPOSED = {kind.__name__: kind for kind in (Both, Either)}


def encode(window: Window | None, where: str) -> Any:
    """A window as a JSON value; ``where`` names its source in the error message.

    Raises:
        ValueError: the window's class is not from ``flexclear.masks``.
    """
    if window is None:
        return None
    kind = type(window).__name__
    if type(window) is Downsampled:
        return {"kind": kind, "window": encode(window.window, where), "factor": window.factor}
    if isinstance(window, Both | Either) and type(window) is COMPOSED.get(kind):
        return {"kind": kind, "parts": [encode(part, where) for part in window.parts]}
    if type(window) is PLAIN.get(kind):
        return {"kind": kind, **dataclasses.asdict(window)}
    raise ValueError(f"{where} has the window {window!r}, which metadata cannot hold: it is not from flexclear.masks")


def decode(found: Any) -> Window | None:
    """The window that ``encode`` was given.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: ``found`` does not describe a window.
    """
    if found is None:
        return None
    kind, fields = found["kind"], {name: value for name, value in found.items() if name != "kind"}
    if kind == "Downsampled":
        inner = decode(fields["window"])
        return Downsampled(inner, fields["factor"])  # type: ignore[arg-type]
    if kind in COMPOSED:
        return COMPOSED[kind](*(decode(part) for part in fields["parts"]))  # type: ignore[arg-type]
    if kind not in PLAIN:
        raise ValueError(f"{kind!r} is not a window that this flexclear knows")
    # JSON turns tuples into lists.
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return PLAIN[kind](**given)
