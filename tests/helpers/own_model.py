"""A small custom model, for which a user registers a family: text last, one stack, a mask for padded text."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from helpers.models import raster_ids

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM


class OwnAttnProcessor:
    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, tokens, turn, mask=None):
        query, key, value = (layer(tokens).unflatten(-1, (HEADS, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = (torch.cat([part * turn[0], part.flip(-1) * turn[1]], -1)[..., ::2] for part in (query, key))
        out = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
        return attn.to_out(out.flatten(2))


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.inner_dim = HEADS, WIDTH
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.processor = OwnAttnProcessor()

    def set_processor(self, processor):
        self.processor = processor

    def forward(self, tokens, turn, mask=None):
        return self.processor(self, tokens, turn, mask=mask)


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attend, self.out = nn.LayerNorm(WIDTH), OwnAttention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens, turn, mask):
        return tokens + self.out(torch.tanh(self.attend(self.norm(tokens), turn, mask)))


class Positions(nn.Module):
    def forward(self, ids):
        angles = ids[:, 1:, None] * torch.linspace(0.05, 1.0, HEAD_DIM // 2, device=ids.device)
        angle = angles.flatten(1)[None, :, None]
        return angle.cos(), angle.sin()


class OwnTransformer2DModel(nn.Module):
    """Takes ``latents`` ``[B, tokens, C]``, ``prompt`` ``[B, T, C]``, ``places`` ``[tokens, 3]`` and ``prompt_mask``."""

    _supports_gradient_checkpointing = True

    def __init__(self, blocks=2):
        super().__init__()
        self.enter, self.words, self.leave = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.where = Positions()
        self.blocks = nn.ModuleList([OwnBlock() for _ in range(blocks)])
        self.is_gradient_checkpointing = False

    def enable_gradient_checkpointing(self):
        self.is_gradient_checkpointing = True

    def disable_gradient_checkpointing(self):
        self.is_gradient_checkpointing = False

    def forward(self, hidden_states, prompt, places, prompt_mask=None, return_dict=True):
        image_len = hidden_states.shape[1]
        tokens = torch.cat([self.enter(hidden_states), self.words(prompt)], 1)
        turn = self.where(torch.cat([places, places.new_zeros(prompt.shape[1], 3)]))
        mask = None
        if prompt_mask is not None:
            mask = torch.cat([prompt_mask.new_ones(len(tokens), image_len), prompt_mask], 1)[:, None, None]
        for block in self.blocks:
            if self.is_gradient_checkpointing and torch.is_grad_enabled():
                tokens = torch.utils.checkpoint.checkpoint(block, tokens, turn, mask, use_reentrant=False)
            else:
                tokens = block(tokens, turn, mask)
        out = self.leave(tokens[:, :image_len])
        return SimpleNamespace(sample=out) if return_dict else (out,)


def own_model(blocks=2):
    torch.manual_seed(3)
    return OwnTransformer2DModel(blocks).eval()


def own_call(height, width, text_len=6, batch=2, padded=True):
    generator = torch.Generator().manual_seed(4)
    call = {
        "hidden_states": torch.randn(batch, height * width, WIDTH, generator=generator),
        "prompt": torch.randn(batch, text_len, WIDTH, generator=generator),
        "places": raster_ids(height, width),
    }
    if padded:
        call["prompt_mask"] = torch.arange(text_len)[None] < torch.tensor([[text_len], [text_len - 3]])[:batch]
    return call
