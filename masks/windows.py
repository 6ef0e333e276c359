"""Windows: which image keys an image query may see. Text sees and is seen by everything.

A window is a frozen dataclass, hashable, that knows nothing of devices. ``window.mask_mod(layout, device)`` binds it
to a sequence and returns a plain FlexAttention ``mask_mod``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexclear.masks.checks import check_int
from flexclear.masks.layout import MAX_SIDE, Layout

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's signature: ``(batch, head, query position, key position) -> bool``, on 0-d or broadcast tensors."""


class Window(Protocol):
    """What the block classification and the cost model ask of a window. All tensors are integer and broadcast."""

    @property
    def name(self) -> str:
        """Short label, parameters included, such as ``disc_r16``."""
        ...

    def allows(self, dy: Tensor, dx: Tensor) -> Tensor:
        """Whether a query sees the key ``(dy, dx)`` away: bool."""
        ...

    def reach(self) -> int:
        """Greatest distance along either axis at which a key can still be seen."""
        ...

    def mask_mod(self, layout: Layout, device: torch.device | str = "cpu") -> MaskMod:
        """The window over ``layout`` as a FlexAttention ``mask_mod``."""
        ...


def coordinate_table(layout: Layout, device: torch.device | str = "cpu") -> Tensor:
    """``layout.packed_coordinates()`` padded with -1 to 2^16, 2^20 or 2^24 entries, int32, for a ``mask_mod`` to capture.

    Why a table: one gather per query and key is all that a partial block then pays for any token order. Why captured
    tensors: FlexAttention compiles Python numbers in, so every size would be a new graph. Why the fixed lengths,
    marked static: everything else about the sequence can be dynamic, so that one graph serves all resolutions of a
    bucket (65,536 tokens is 4096 x 4096 px); and a *dynamic* table does not even compile on CPU, where Inductor's C++
    template replaces the name ``ks1`` inside ``ks19`` (torch 2.13).
    """
    packed = layout.packed_coordinates()
    bucket = next(1 << bits for bits in (16, 20, 24, 30) if len(packed) <= 1 << bits)
    table = torch.full((bucket,), -1, dtype=torch.int32, device=device)
    table[: len(packed)] = packed.to(device)
    torch._dynamo.mark_static(table)
    return table


def _labelled(mask_mod: MaskMod, window: Window) -> MaskMod:
    """Name the function after its window and let it carry it, so that ``block_mask`` can classify it analytically."""
    mask_mod.__name__ = window.name
    mask_mod.window = window  # type: ignore[attr-defined]
    return mask_mod


def as_window(window: Window | MaskMod) -> Window:
    """The window itself, or the one that a ``mask_mod`` of this package carries.

    Raises:
        TypeError: neither a window nor such a ``mask_mod``.
    """
    found = getattr(window, "window", window)
    if isinstance(found, Disc):
        return found
    raise TypeError(
        f"window must be a window of flexclear.masks such as Disc(16), or the mask_mod that disc(layout, r) returns; "
        f"got {window!r}"
    )


@dataclass(frozen=True)
class Disc:
    r"""CLEAR's circular window, clipped at the image border, never shifted (paper section 3.2).

    .. math:: (y_q - y_k)^2 + (x_q - x_k)^2 < r^2

    Args:
        radius: window radius r in tokens, 1 or more; the inequality is strict, so r = 1 is the token itself.

    Raises:
        TypeError: radius is not an int.
        ValueError: radius < 1.
    """

    radius: int

    def __post_init__(self) -> None:
        check_int("window radius r", self.radius, 1, None, "in tokens")

    @property
    def name(self) -> str:
        return f"disc_r{self.radius}"

    def _squared_radius(self) -> int:
        # Beyond the largest diagonal every radius is the same window; clamping keeps the square inside 32 bits.
        return min(self.radius, 2 * MAX_SIDE) ** 2

    def allows(self, dy: Tensor, dx: Tensor) -> Tensor:
        return dy * dy + dx * dx < self._squared_radius()

    def reach(self) -> int:
        return self.radius - 1

    def mask_mod(self, layout: Layout, device: torch.device | str = "cpu") -> MaskMod:
        packed = coordinate_table(layout, device)
        squared_radius = torch.tensor(self._squared_radius(), dtype=torch.int32, device=device)

        def disc_mask(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            q, kv = packed[q_idx], packed[kv_idx]
            dy = (q >> 16) - (kv >> 16)
            dx = (q & 0xFFFF) - (kv & 0xFFFF)
            return (dy * dy + dx * dx < squared_radius) | (q < 0) | (kv < 0)

        return _labelled(disc_mask, self)


def disc(layout: Layout, r: int, device: torch.device | str = "cpu") -> MaskMod:
    """CLEAR's window of radius ``r`` over ``layout`` as a FlexAttention ``mask_mod``; see ``Disc``.

    >>> import torch
    >>> mask_mod = disc(Layout(4, 4, text_len=0, order="raster"), r=2)
    >>> [bool(mask_mod(None, None, torch.tensor(0), torch.tensor(k))) for k in (1, 2, 4, 5)]
    [True, False, True, True]

    Args:
        layout: the sequence.
        r: window radius in tokens, 1 or more.
        device: where the lookup table of coordinates is put; FlexAttention wants it beside query and key.

    Raises:
        TypeError, ValueError: ``r`` is not a positive int.
    """
    return Disc(r).mask_mod(layout, device)
