"""Reference implementations of the alternatives: plain code in float64 and raster order."""

from __future__ import annotations

import math

import torch
from torch import nn

from helpers.flux_reference import ReferenceProcessor, double, reference_model


class Windowed(ReferenceProcessor):
    """Softmax attention under any rule ``sees(y, x, other_y, other_x)`` between image tokens."""

    def __init__(self, sees, grid, text_len):
        super().__init__(None, grid, text_len)
        self.sees = sees

    def seen(self):
        places = self.places()
        seen = torch.ones(len(places), len(places), dtype=torch.bool)
        for i, place in enumerate(places):
            for j, other in enumerate(places):
                if i >= self.text_len and j >= self.text_len:
                    seen[i, j] = self.sees(*place, *other)
        return seen


class Sigmoid(ReferenceProcessor):
    def __init__(self, grid, text_len):
        super().__init__(None, grid, text_len)

    def mix(self, query, key, value):
        n, d = key.shape[-2:]
        weights = 1 / (1 + torch.exp(-(query @ key.transpose(2, 3) / math.sqrt(d) - math.log(n))))
        return weights @ value


class Linear(Sigmoid):
    """The weights of all pairs are materialized, then normalized."""

    def mix(self, query, key, value):
        phi = lambda tokens: nn.functional.elu(tokens) + 1  # noqa: E731
        weights = phi(query) @ phi(key).transpose(2, 3)
        return weights / weights.sum(-1, keepdim=True) @ value


class PixArt(ReferenceProcessor):
    """``filters``: ``[channels, 1, d, d]``, channel by channel through the heads."""

    def __init__(self, grid, text_len, filters):
        super().__init__(None, grid, text_len)
        self.filters = nn.Parameter(filters.detach().double().clone())

    def mix(self, query, key, value):
        t = self.text_len
        keys, values = (
            torch.cat([tokens[:, :, :t], self.compressed(tokens[:, :, t:])], dim=2) for tokens in (key, value)
        )
        text = softmax_attention(query[:, :, :t], key, value)
        return torch.cat([text, softmax_attention(query[:, :, t:], keys, values)], dim=2)

    def compressed(self, image):
        heads, channels = image.shape[1], image.shape[3]
        filters = self.filters.view(heads, channels, *self.filters.shape[2:])
        (height, width), d = self.grid, self.filters.shape[-1]
        cells = []
        for top in range(0, height, d):
            for left in range(0, width, d):
                rows, columns = range(top, min(top + d, height)), range(left, min(left + d, width))
                total = sum(
                    image[:, :, y * width + x] * filters[:, :, y - top, x - left] for y in rows for x in columns
                )
                cells.append(total * d * d / (len(rows) * len(columns)))
        return torch.stack(cells, dim=2)


class Agent(ReferenceProcessor):
    """``side`` agents along each axis, or as many as there are rows or columns."""

    def __init__(self, grid, text_len, side):
        super().__init__(None, grid, text_len)
        self.side = side

    def mix(self, query, key, value):
        t = self.text_len
        agents = self.pooled_queries(query[:, :, t:])
        read = softmax_attention(agents, key[:, :, t:], value[:, :, t:])
        image = softmax_attention(
            query[:, :, t:], torch.cat([key[:, :, :t], agents], dim=2), torch.cat([value[:, :, :t], read], dim=2)
        )
        return torch.cat([softmax_attention(query[:, :, :t], key, value), image], dim=2)

    def pooled_queries(self, image):
        height, width = self.grid
        rows, columns = min(self.side, height), min(self.side, width)
        agents = []
        for i in range(rows):
            for j in range(columns):
                ys = range(i * height // rows, -(-(i + 1) * height // rows))
                xs = range(j * width // columns, -(-(j + 1) * width // columns))
                agents.append(sum(image[:, :, y * width + x] for y in ys for x in xs) / (len(ys) * len(xs)))
        return torch.stack(agents, dim=2)


def softmax_attention(query, key, value):
    return (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(-1) @ value


__all__ = ["Agent", "Linear", "PixArt", "Sigmoid", "Windowed", "double", "reference_model"]
