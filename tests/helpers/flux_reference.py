"""A reference implementation of FLUX's attention, plain code in float64 and raster order, for comparison with transformed
models."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


class ReferenceProcessor(nn.Module):
    """One attention layer of FLUX, text first, written from the method's description with loops and full matrices.

    Args:
        r: radius of the disc, or None: every image token.
        grid: (height, width) in tokens.
        text_len: text tokens.
        weight: pooling weights ``[d, d]``, or None: no pooled keys.
        theta: base of the rotary frequencies.
        proportional: scale sqrt(log_4608(n) / head_dim) for n keys, with n taken ten times as large if there are pooled keys.
    """

    def __init__(self, r, grid, text_len, weight=None, theta=10000.0, proportional=False):
        super().__init__()
        self.r, self.grid, self.text_len, self.theta, self.proportional = r, grid, text_len, theta, proportional
        self.weight = None if weight is None else nn.Parameter(weight.detach().double().clone())

    def forward(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):  # fmt: skip
        heads = lambda tokens: tokens.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)  # noqa: E731
        query, key = attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text))), query], dim=2)
            key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text))), key], dim=2)
            value = torch.cat([heads(attn.add_v_proj(text)), value], dim=2)
        out = self.mix(self.rotate(query), self.rotate(key), value).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        return attn.to_out[0](out[:, self.text_len :]), attn.to_add_out(out[:, : self.text_len])

    def mix(self, query, key, value):
        """Attention of ``[B, heads, N, head_dim]``."""
        seen = self.seen()
        keys = query.shape[2]
        if self.weight is not None:
            key, value = (torch.cat([t, self.pooled(t[:, :, self.text_len :])], dim=2) for t in (key, value))
            pooled = torch.ones(keys, key.shape[2] - keys, dtype=torch.bool)
            pooled[: self.text_len] = False
            seen = torch.cat([seen, pooled], dim=1)
            keys *= 10
        scale = math.sqrt((math.log(keys) / math.log(4608) if self.proportional else 1.0) / query.shape[-1])
        scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -math.inf)
        return scores.softmax(-1) @ value

    def places(self):
        """(row, column) of each token, (0, 0) for text."""
        height, width = self.grid
        return [(0, 0)] * self.text_len + [(y, x) for y in range(height) for x in range(width)]

    def rotate(self, tokens):
        """Rotary embedding over (index, y, x) with axes (4, 6, 6): neighbouring channels rotate as one complex number."""
        angles = []
        for y, x in self.places():
            for place, channels in ((0, 4), (y, 6), (x, 6)):
                angles += [place / self.theta ** (2 * pair / channels) for pair in range(channels // 2)]
        angles = torch.tensor(angles, dtype=torch.float64).view(len(self.places()), 8)
        turned = torch.view_as_complex(tokens.unflatten(-1, (8, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(-2)

    def seen(self):
        """Which keys each query sees."""
        n = len(self.places())
        seen = torch.ones(n, n, dtype=torch.bool)
        if self.r is None:
            return seen
        for i, (y, x) in enumerate(self.places()):
            for j, (other_y, other_x) in enumerate(self.places()):
                if i >= self.text_len and j >= self.text_len:
                    seen[i, j] = (y - other_y) ** 2 + (x - other_x) ** 2 < self.r**2
        return seen

    def pooled(self, image):
        """One token per cell; the weights of a cut-off cell are scaled up so that equal ones still give a mean."""
        (height, width), d = self.grid, len(self.weight)
        cells = []
        for top in range(0, height, d):
            for left in range(0, width, d):
                rows, columns = range(top, min(top + d, height)), range(left, min(left + d, width))
                grown = d * d / (len(rows) * len(columns))
                cells.append(
                    sum(
                        image[:, :, y * width + x] * self.weight[y - top, x - left] * grown
                        for y in rows
                        for x in columns
                    )
                )
        return torch.stack(cells, dim=2)


def double(call):
    """The arguments of a call in float64."""
    return {name: value.double() for name, value in call.items()}


def reference_model(model, processors):
    """A float64 copy of an untransformed model with one processor per layer, in the order of the forward pass."""
    copied = copy.deepcopy(model).double()
    for block, processor in zip(
        [*copied.transformer_blocks, *copied.single_transformer_blocks], processors, strict=True
    ):
        block.attn.set_processor(processor)
    return copied
