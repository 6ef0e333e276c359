"""Direct evaluation of a ``mask_mod`` in bounded memory: exact for any function, in quadratic time."""

from __future__ import annotations

import torch
from torch import Tensor

from flexclear.masks.windows import MaskMod

MAX_PAIRS_AT_ONCE = 1 << 24
"""Token pairs that are evaluated at once; about 200 MB with the intermediate results of a typical rule."""


def ask(mask_mod: MaskMod, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """``mask_mod`` for batch 0 and head 0 on broadcast positions: bool.

    Raises:
        TypeError: it does not return a bool tensor of the broadcast shape.
    """
    zero = torch.zeros((), dtype=torch.int64, device=q_idx.device)
    answer = mask_mod(zero, zero, q_idx, kv_idx)
    shape = torch.broadcast_shapes(q_idx.shape, kv_idx.shape)
    if not isinstance(answer, Tensor) or answer.dtype != torch.bool:
        given = f"a {answer.dtype} tensor" if isinstance(answer, Tensor) else repr(answer)
        raise TypeError(
            f"mask_mod {getattr(mask_mod, '__name__', mask_mod)!r} must return a bool tensor, but returned {given}"
        )
    return answer.expand(shape)


def scan_blocks(
    mask_mod: MaskMod, q_len: int, kv_len: int, block_size: tuple[int, int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Classify every block by evaluating all its token pairs; padding counts as not allowed.

    Args:
        mask_mod: a function of the positions alone; it is evaluated for batch 0 and head 0.
        q_len, kv_len: tokens along each axis.
        block_size: tokens per (query, key-value) block.
        device: where the function's captured tensors are.

    Returns:
        ``(any, all)``: whether any pair of a block is allowed, and whether every pair is; bool ``[q blocks, kv blocks]``.
    """
    q_size, kv_size = block_size
    q_blocks, kv_blocks = -(-q_len // q_size), -(-kv_len // kv_size)
    rows_at_once = max(1, MAX_PAIRS_AT_ONCE // (q_size * kv_blocks * kv_size))
    kv_idx = torch.arange(kv_blocks * kv_size, device=device)
    found_any, found_all = [], []
    for start in range(0, q_blocks, rows_at_once):
        q_idx = torch.arange(start * q_size, min(start + rows_at_once, q_blocks) * q_size, device=device)
        inside = (q_idx < q_len)[:, None] & (kv_idx < kv_len)[None, :]
        # Positions beyond the end are clamped to the last one, so that tables are never read past their end.
        allowed = ask(mask_mod, q_idx.clamp_max(q_len - 1)[:, None], kv_idx.clamp_max(kv_len - 1)[None, :]) & inside
        blocks = allowed.view(-1, q_size, kv_blocks, kv_size).transpose(1, 2).flatten(2)
        found_any.append(blocks.any(-1).cpu())
        found_all.append(blocks.all(-1).cpu())
    return torch.cat(found_any), torch.cat(found_all)


def count_in_blocks(
    mask_mod: MaskMod, q: Tensor, kv: Tensor, q_len: int, kv_len: int, block_size: tuple[int, int]
) -> int:
    """Allowed token pairs inside the given blocks, exact. ``q`` and ``kv``: block indices, int64 ``[pairs]``, on CPU."""
    q_size, kv_size = block_size
    at_once = max(1, MAX_PAIRS_AT_ONCE // (q_size * kv_size))
    q_inside, kv_inside = torch.arange(q_size)[:, None], torch.arange(kv_size)[None, :]
    total = 0
    for q_some, kv_some in zip(q.split(at_once), kv.split(at_once), strict=True):
        q_idx = q_some[:, None, None] * q_size + q_inside
        kv_idx = kv_some[:, None, None] * kv_size + kv_inside
        allowed = ask(mask_mod, q_idx.clamp_max(q_len - 1), kv_idx.clamp_max(kv_len - 1))
        total += int((allowed & (q_idx < q_len) & (kv_idx < kv_len)).sum())
    return total
