"""What the CPU of this process multiplies well: FlexAttention's kernel and the size of its blocks go by it."""

from __future__ import annotations

import torch


def _packed_types() -> tuple[torch.dtype, ...]:
    asked = ((torch.bfloat16, "_is_amx_tile_supported"), (torch.float16, "_is_amx_fp16_supported"))
    return tuple(dtype for dtype, name in asked if getattr(torch.cpu, name, lambda: False)())


PACKED_TYPES = _packed_types()
"""Types that FlexAttention's CPU kernel multiplies by oneDNN's packed products: those of AMX. Any other type it multiplies in
float32, and converts each number of bfloat16 and float16 as often as it is used."""
