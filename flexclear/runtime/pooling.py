"""Down-sampled keys and values: one pooled token per cell of the image grid (method, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexclear.masks import Layout


@dataclass(frozen=True, eq=False)
class Pooling:
    """Which tokens each cell pools. Cells are in raster order, as in ``Downsampled``.

    Attributes:
        members: place in image order of each cell's tokens, row by row inside the cell, int64 ``[cells * d * d]``. A cut-off
            cell repeats one of its tokens in place of missing ones.
        text_first: whether text precedes the image in the sequence, or follows it.
        image_len: number of image tokens.
        share: factor on each member, float32 ``[cells, d * d]``: 1 in whole cells; in a cut-off cell 0 for missing tokens and
            ``d * d / present`` for the others, so that equal weights still give a mean.
    """

    members: Tensor
    share: Tensor
    text_first: bool
    image_len: int

    def append(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Keys or values ``[B, heads, N, head_dim]`` in sequence order, followed by their pooled ones; see ``pool``."""
        start = tokens.shape[2] - self.image_len if self.text_first else 0
        image = tokens[:, :, start : start + self.image_len]
        return torch.cat([tokens, self.pool(image, weight)], dim=2)

    def pool(self, image: Tensor, weight: Tensor) -> Tensor:
        """Weighted sum over each cell.

        Args:
            image: keys or values in image order, ``[B, heads, image_len, head_dim]``.
            weight: one number per place in a cell, shared by heads and channels, ``d * d`` elements in raster order
                (the released ``spatial_weight``, ``[1, 1, 1, d, 1, d, 1]``).

        Returns:
            ``[B, heads, cells, head_dim]``.
        """
        cells, places = self.share.shape
        gathered = image.index_select(2, self.members).unflatten(2, (cells, places))
        factors = (weight.reshape(1, places) * self.share).to(image.dtype)
        return torch.einsum("bhcpd,cp->bhcd", gathered, factors)


def make_pooling(layout: Layout, factor: int, device: torch.device) -> Pooling:
    """The cells of ``factor`` x ``factor`` tokens over the layout's grid, cut off at sides that ``factor`` does not divide."""
    height, width = layout.height, layout.width
    place = layout.inverse_permutation().view(height, width)
    inner = torch.arange(factor)
    y = (torch.arange(-(-height // factor)) * factor)[:, None, None, None] + inner[:, None]
    x = (torch.arange(-(-width // factor)) * factor)[None, :, None, None] + inner
    y, x = torch.broadcast_tensors(y, x)
    present = ((y < height) & (x < width)).flatten(0, 1).flatten(1).float()
    members = place[y.clamp(max=height - 1), x.clamp(max=width - 1)].flatten()
    share = present * (factor * factor) / present.sum(1, keepdim=True)
    return Pooling(members.to(device), share.to(device), layout.text_first, layout.image_len)
