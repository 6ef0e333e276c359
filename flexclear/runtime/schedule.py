"""Which window each attention layer gets: one radius for all, or one per layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from flexclear.masks import Disc, Downsampled, Window
from flexclear.runtime.facts import Layer, Slot

Radius: TypeAlias = int | Window | None
"""A window radius in tokens, a window, or None for a layer that stays dense."""

Radii: TypeAlias = Radius | Sequence[Radius] | Mapping[int | str, Radius] | Callable[[int, str], Radius]
"""One radius for all layers, or one per layer; see ``resolve``."""

REST = "default"
"""Key of a mapping that stands for all layers that no other key names."""


def resolve(
    r: Radii, layers: Sequence[Layer], down_factor: int | None = None, made: Callable[[int], Window] = Disc
) -> list[Window | None]:
    """The window of each layer, in order; None for a layer that stays dense.

    Args:
        r: a radius, a window, or None; or one per layer:
            a sequence with one entry per layer;
            a mapping from layer indices, module names or prefixes of names (the longest match wins), with ``"default"``
            for all others;
            a function of (index, module name).
        layers: the model's attention layers.
        down_factor: side in tokens of the cells that are pooled into additional keys, or None.
        made: makes the window for a radius.

    Raises:
        TypeError: something is not a radius.
        ValueError: a radius is out of range, a layer is left out, or a key names no layer.
    """
    windows = []
    for layer, radius in zip(layers, _per_layer(r, layers), strict=True):
        if isinstance(radius, Window) or radius is None:
            window = radius
        else:
            try:
                window = made(radius)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{error} (for {layer.name})" if not _is_radius(r) else str(error)) from None
        windows.append(window if window is None or down_factor is None else Downsampled(window, down_factor))
    return windows


def slots(layers: Sequence[Layer], windows: Sequence[Window | None]) -> tuple[Slot, ...]:
    """The distinct pairs of scope and window, in the order in which layers first use them."""
    return tuple(dict.fromkeys((layer.scope, window) for layer, window in zip(layers, windows, strict=True)))


def _is_radius(r: Radii) -> bool:
    return not (isinstance(r, Mapping | Sequence) or callable(r)) or isinstance(r, str | Window)


def _per_layer(r: Radii, layers: Sequence[Layer]) -> list[Radius]:
    if _is_radius(r):
        return [r] * len(layers)  # type: ignore[list-item]
    if isinstance(r, Mapping):
        return _from_mapping(r, layers)
    if isinstance(r, Sequence):
        if len(r) != len(layers):
            raise ValueError(f"r as a sequence needs one radius per attention layer: {len(layers)}, got {len(r)}")
        return list(r)
    return [r(index, layer.name) for index, layer in enumerate(layers)]  # type: ignore[operator, misc]


def _from_mapping(r: Mapping[int | str, Radius], layers: Sequence[Layer]) -> list[Radius]:
    names = [layer.name for layer in layers]
    for key in r:
        is_index = isinstance(key, int) and not isinstance(key, bool)
        known = key in range(len(names)) if is_index else any(_begins(name, str(key)) for name in names)
        if not known and key != REST:
            raise ValueError(
                f"r as a mapping has the key {key!r}, which names no attention layer. Keys are indices 0 to "
                f"{len(names) - 1}, module names such as {names[0]!r}, their beginnings, or {REST!r}"
            )
    radii = []
    for index, name in enumerate(names):
        fitting = [key for key in r if isinstance(key, str) and _begins(name, key)]
        key = index if index in r else max(fitting, key=len, default=REST)
        if key not in r:
            raise ValueError(f"r as a mapping does not cover {name} (layer {index}); add it, or {REST!r} for the rest")
        radii.append(r[key])
    return radii


def _begins(name: str, beginning: str) -> bool:
    return name == beginning or name.startswith(beginning + ".")
