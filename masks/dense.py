"""The slow reference: every pair of the sequence, as one boolean matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from flexclear.masks.layout import Layout
from flexclear.masks.windows import MaskMod, Window, as_window


def dense_mask(layout: Layout, window: Window | MaskMod, device: torch.device | str = "cpu") -> Tensor:
    """Which pairs may attend, bool ``[seq_len, seq_len]`` in sequence order, queries along the rows.

    Computed from coordinates by the window's inequality, by another road than the ``mask_mod`` and the block lists,
    which are tested against it. Memory is quadratic: for tests, small sequences and masked SDPA.

    >>> dense_mask(Layout(2, 2, text_len=1, order="raster"), Disc(1)).int()
    tensor([[1, 1, 1, 1, 1],
            [1, 1, 0, 0, 0],
            [1, 0, 1, 0, 0],
            [1, 0, 0, 1, 0],
            [1, 0, 0, 0, 1]], dtype=torch.int32)

    Raises:
        TypeError: ``window`` is no window of this package.
    """
    window = as_window(window)
    y, x = (axis.to(device, torch.int32) for axis in layout.coordinates())
    start = layout.image_start
    image = slice(start, start + layout.image_len)
    mask = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool, device=device)
    mask[image, image] = window.allows(y[:, None] - y[None, :], x[:, None] - x[None, :])
    return mask
