"""The slow reference: every pair of the sequence, as one boolean matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from flexclear.masks.coordinates import int_number
from flexclear.masks.defaults import independent
from flexclear.masks.layout import Layout
from flexclear.masks.places import POOLED, TEXT, Coordinates
from flexclear.masks.scan import ask
from flexclear.masks.windows import MaskMod, Window, as_window, is_plain


@independent
def dense_mask(layout: Layout, window: Window | MaskMod, device: torch.device | str = "cpu") -> Tensor:
    """Which pairs may attend, bool ``[seq_len, keys]`` in sequence order, queries along the rows.

    Built from coordinates, one kind of token after another, independently of the ``mask_mod`` and the block lists, which are
    tested against it. Keys are the sequence itself, followed by the window's pooled keys, if any. Memory is quadratic: use it
    for tests, small sequences and masked SDPA.

    >>> dense_mask(Layout(2, 2, text_len=1, order="raster"), Disc(1)).int()
    tensor([[1, 1, 1, 1, 1],
            [1, 1, 0, 0, 0],
            [1, 0, 1, 0, 0],
            [1, 0, 0, 1, 0],
            [1, 0, 0, 0, 1]], dtype=torch.int32)

    Args:
        layout: the sequence.
        window: a window such as ``Disc(16)``, or any ``mask_mod`` over the layout's sequence positions.
        device: where the mask is built, and where a custom ``mask_mod`` has its tensors.

    Raises:
        TypeError: ``window`` is neither a window nor a ``mask_mod``.
    """
    if is_plain(window):
        place = torch.arange(layout.seq_len, device=device)
        return ask(window, place[:, None], place[None, :]).clone()
    window = as_window(window)
    window.check(layout)
    places = [axis.to(device, torch.int32) for axis in layout.coordinates()]
    inside = window.rule(layout, int_number(device))
    keys = window.key_coordinates(layout).to(device)
    is_text = keys[: layout.seq_len] == TEXT
    image = torch.nonzero(~is_text)[:, 0]
    mask = torch.zeros(layout.seq_len, len(keys), dtype=torch.bool, device=device)
    mask[image[:, None], image[None, :]] = inside(_along(places, -1), _along(places, 0))
    mask[is_text] = keys != POOLED
    mask[:, keys == TEXT] = True
    mask[image[:, None], torch.nonzero(keys == POOLED)[:, 0][None, :]] = True
    return mask


def _along(places: list[Tensor], dim: int) -> Coordinates:
    """Coordinates with a new axis at ``dim``, to be broadcast against others."""
    frame, row, column = (axis.unsqueeze(dim) for axis in places)
    return frame, row, column
