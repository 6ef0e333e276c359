"""Text padding: text tokens that no query may see, which differ from sample to sample of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexclear.masks.carried import carry
from flexclear.masks.defaults import independent
from flexclear.masks.layout import Layout
from flexclear.masks.lengths import mark_static, of_any_text_length
from flexclear.masks.windows import MaskMod


@independent
def with_text_mask(mask: BlockMask | Tensor, layout: Layout, keep: Tensor) -> BlockMask | Tensor:
    """``mask`` without the text keys that are padding. The block lists are shared, not copied.

    Rows of padded text queries stay: they see what text sees, and nothing attends to them.

    Args:
        mask: from ``block_mask(..., text_padded=True)``, or a dense ``[seq_len, keys]``.
        layout: the layout that it was made for.
        keep: bool ``[B, text_len]``, False where a text token is padding.

    Returns:
        A BlockMask over ``B`` samples, or a dense bool ``[B, 1, seq_len, keys]``.

    Raises:
        ValueError: ``keep`` has another shape or dtype.
    """
    if keep.dtype != torch.bool or keep.ndim != 2 or keep.shape[1] != layout.text_len:
        raise ValueError(
            f"keep must be bool of shape [batch, {layout.text_len}], got {keep.dtype} of shape {tuple(keep.shape)}"
        )
    return with_text_mask_at(mask, 0 if layout.text_first else layout.image_len, keep)


@independent
def with_text_mask_at(mask: BlockMask | Tensor, start: int, keep: Tensor) -> BlockMask | Tensor:
    """``with_text_mask`` for text keys that start at key ``start``."""
    if isinstance(mask, Tensor):
        seen = torch.ones(len(keep), mask.shape[1], dtype=torch.bool, device=mask.device)
        seen[:, start : start + keep.shape[1]] = keep.to(mask.device)
        return of_any_text_length(mask & seen[:, None, None, :])
    lists = {
        name: getattr(mask, name)
        for kind in ("kv", "full_kv", "q", "full_q")
        for name in (f"{kind}_num_blocks", f"{kind}_indices")
    }
    padded = BlockMask(
        seq_lengths=mask.seq_lengths,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=_unpadded(mask.mask_mod, keep.to(mask.kv_indices.device), start),
        **lists,
    )
    return carry(mask, padded)


def _unpadded(inner: MaskMod, keep: Tensor, start: int) -> MaskMod:
    """``inner`` combined with the table of kept text. Sizes are tensors, so that a new prompt needs no new graph."""
    device, length = keep.device, keep.shape[1]
    bucket = next(1 << bits for bits in (16, 20, 24) if keep.numel() <= 1 << bits)
    table = torch.ones(bucket, dtype=torch.bool, device=device)
    table[: keep.numel()] = keep.reshape(-1)
    mark_static(table)
    # Filled on the device: torch.tensor would copy each number to it and wait, in every call of the model.
    first, count, last, zero = (
        torch.full((), n, dtype=torch.int32, device=device) for n in (start, length, length - 1, 0)
    )

    def unpadded(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        place = kv_idx - first
        kept = table[batch * count + torch.minimum(torch.maximum(place, zero), last)]
        return inner(batch, head, q_idx, kv_idx) & (kept | (place < 0) | (place >= count))

    return unpadded
