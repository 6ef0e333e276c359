"""Windows over a layout as plain FlexAttention ``mask_mod`` functions, in one call each.

Each is ``Window(...).mask_mod(layout, device)``; the classes document the arguments and the errors.
"""

from __future__ import annotations

import torch

from flexclear.masks.downsampled import Downsampled
from flexclear.masks.layout import Layout
from flexclear.masks.neighborhoods import Neighborhood, Square
from flexclear.masks.shapes import Disc, Full, Strided, Swin
from flexclear.masks.windows import MaskMod, Window, as_window

Device = torch.device | str


def disc(layout: Layout, r: int, device: Device = "cpu") -> MaskMod:
    """CLEAR's circular window of radius ``r``; see ``Disc``.

    >>> import torch
    >>> mask_mod = disc(Layout(4, 4, text_len=0, order="raster"), r=2)
    >>> [bool(mask_mod(None, None, torch.tensor(0), torch.tensor(k))) for k in (1, 2, 4, 5)]
    [True, False, True, True]

    Args:
        layout: the sequence.
        r: window radius in tokens, 1 or more.
        device: where the captured tables are placed; FlexAttention needs them on the device of query and key.

    Raises:
        TypeError, ValueError: ``r`` is not a positive int.
    """
    return Disc(r).mask_mod(layout, device)


def square(layout: Layout, r: int, device: Device = "cpu") -> MaskMod:
    """A clipped square window of half side ``r``; see ``Square``."""
    return Square(r).mask_mod(layout, device)


def neighborhood(layout: Layout, kernel: int, device: Device = "cpu") -> MaskMod:
    """NATTEN's window of ``kernel`` x ``kernel``, shifted inwards at the border; see ``Neighborhood``."""
    return Neighborhood(kernel).mask_mod(layout, device)


def swin(layout: Layout, window: int, shift: int = 0, device: Device = "cpu") -> MaskMod:
    """Swin's partition into ``window`` x ``window`` cells, shifted by ``shift``; see ``Swin``."""
    return Swin(window, shift).mask_mod(layout, device)


def strided(layout: Layout, stride: int, device: Device = "cpu") -> MaskMod:
    """Keys of the query's own phase on a grid of ``stride``; see ``Strided``."""
    return Strided(stride).mask_mod(layout, device)


def full(layout: Layout, device: Device = "cpu") -> MaskMod:
    """Dense attention; see ``Full``."""
    return Full().mask_mod(layout, device)


def with_downsampled(window: Window | MaskMod, factor: int) -> Downsampled:
    """A window with pooled keys of ``factor`` x ``factor`` cells behind its keys; see ``Downsampled``.

    >>> with_downsampled(Disc(8), 4).key_len(Layout(64, 64)) - Layout(64, 64).seq_len
    256
    """
    return Downsampled(as_window(window), factor)
