"""The work of a step outside attention, counted from a model's linear layers."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_ONCE = re.compile(r"norm|mod(?![a-z]*el)|time|temb|guidance|adaln|pooled|(?<!con)text_embedder", re.IGNORECASE)
_CROSS = re.compile(r"(attn2|cross_attn)\.to_[kv]$")
_SOUND = re.compile(r"audio_(attn|ff|proj|caption)|audio_to_video_attn\.to_[kv]|video_to_audio_attn\.to_(q|out)")
_TEXT = re.compile(r"add_|_add|context|txt|encoder|caption|cap_", re.IGNORECASE)


def linear_flops(model: nn.Module, family: Any, image_len: int, text_len: int) -> int:
    """FLOPs of all linear layers in one step of one sample.

    In a block with separate linear layers for text, the others run over image tokens only; in a block without, over both. With
    cross-attention to text, its keys and values are of text only. Layers that modulate blocks run once per sample. Sound counts
    the same way, as there is little of it. The kind of each layer is read from diffusers' names. All experts of a mixture count
    as if they ran.

    Args:
        model: the transformer, with weights or without.
        family: its family.
        image_len, text_len: numbers of tokens.
    """
    stacks = tuple(f"{path}." for path in family.stacks)
    total = 0
    two_streams: dict[str, bool] = {}
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, _ in named:
        block = _block_of(name, stacks)
        if block is not None:
            inside = name[len(block) + 1 :]
            own = _TEXT.search(inside) is not None and _ONCE.search(inside) is None
            two_streams[block] = two_streams.get(block, False) or own
    for name, linear in named:
        block = _block_of(name, stacks)
        inside = name if block is None else name[len(block) + 1 :]
        if _ONCE.search(inside) or _SOUND.search(name):
            tokens = 1
        elif _TEXT.search(inside) or (not family.joins and _CROSS.search(inside)):
            tokens = text_len
        elif block is None or two_streams[block] or not family.joins:
            tokens = image_len
        else:
            tokens = image_len + text_len
        total += 2 * linear.in_features * linear.out_features * tokens
    return total


def _block_of(name: str, stacks: tuple[str, ...]) -> str | None:
    """Path of the stack block that contains a module, or None."""
    stack = next((one for one in stacks if name.startswith(one)), None)
    if stack is None:
        return None
    return stack + name[len(stack) :].split(".", 1)[0]
