"""Data types that this machine's CPU multiplies fast; FlexAttention's kernel and its block sizes depend on them."""

from __future__ import annotations

import torch


def _packed_types() -> tuple[torch.dtype, ...]:
    asked = ((torch.bfloat16, "_is_amx_tile_supported"), (torch.float16, "_is_amx_fp16_supported"))
    return tuple(dtype for dtype, name in asked if getattr(torch.cpu, name, lambda: False)())


PACKED_TYPES = _packed_types()
"""Types that FlexAttention's CPU kernel multiplies with oneDNN's packed products, which need AMX. It multiplies every other type
in float32, converting bfloat16 and float16 numbers each time they are used."""
