"""Local attention without a sparse kernel: the keys that each query sees are gathered, and SDPA runs over them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexclear.masks import Layout

CHUNK = 256
"""Queries whose keys are gathered at a time: copies of all would be some hundred times the keys."""


class Gathered:
    """CLEAR's window over tokens row by row, text first.

    Args:
        layout: in raster order.
        radius: of the window.
        device: of the tensors.

    Attributes:
        keys: image keys that are gathered for a query, those outside the image too.
    """

    def __init__(self, layout: Layout, radius: int, device: torch.device) -> None:
        offset = torch.arange(1 - radius, radius)
        dy, dx = (grid.reshape(-1) for grid in torch.meshgrid(offset, offset, indexing="ij"))
        near = dy * dy + dx * dx < radius * radius
        _, y, x = layout.coordinates()
        rows, columns = y[:, None] + dy[near], x[:, None] + dx[near]
        self.text_len, self.keys = layout.text_len, int(near.sum())
        inside = (rows >= 0) & (rows < layout.height) & (columns >= 0) & (columns < layout.width)
        place = rows.clamp(0, layout.height - 1) * layout.width + columns.clamp(0, layout.width - 1)
        self.place = (self.text_len + place).to(device)
        text = torch.ones(len(inside), self.text_len, dtype=torch.bool)
        self.allowed = torch.cat([text, inside], 1)[:, None, None].to(device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[1, heads, N, D]`` each."""
        text = self.text_len
        out = torch.empty_like(query)
        out[:, :, :text] = F.scaled_dot_product_attention(query[:, :, :text], key, value)
        for start in range(0, len(self.place), CHUNK):
            place = self.place[start : start + CHUNK]
            end = start + len(place)
            near = [self._near(tokens, place) for tokens in (key, value)]
            one = query[0, :, text + start : text + end].transpose(0, 1)[:, :, None]
            found = F.scaled_dot_product_attention(one, *near, attn_mask=self.allowed[start:end])
            out[0, :, text + start : text + end] = found[:, :, 0].transpose(0, 1)
        return out

    def _near(self, tokens: Tensor, place: Tensor) -> Tensor:
        """Text, then what is near, of some queries: ``[queries, heads, text + keys, D]``."""
        image = tokens[0][:, place].transpose(0, 1)
        text = tokens[0, None, :, : self.text_len].expand(len(place), -1, -1, -1)
        return torch.cat([text, image], 2)
