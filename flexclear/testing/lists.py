"""Block lists against a dense mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def blocks_of(mask: Tensor, block_size: tuple[int, int]) -> Tensor:
    """A dense mask cut into blocks, padded with False: bool ``[q blocks, kv blocks, Q, KV]``."""
    rows, columns = (-(-length // size) for length, size in zip(mask.shape, block_size, strict=True))
    padded = mask.new_zeros(rows * block_size[0], columns * block_size[1])
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded.view(rows, block_size[0], columns, block_size[1]).transpose(1, 2)


def listed_blocks(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """The blocks in a BlockMask's lists: bool ``[rows, columns]``."""
    counts, indices = counts[0, 0].cpu(), indices[0, 0].cpu().long()
    named = torch.arange(indices.shape[-1])[None, :] < counts[:, None]
    found = torch.zeros(len(counts), columns, dtype=torch.bool)
    rows = torch.arange(len(counts))[:, None].expand_as(indices)
    found[rows[named], indices[named]] = True
    return found


def both_lists(mask: BlockMask, by: str) -> tuple[Tensor, Tensor]:
    """The partial and the full blocks that a BlockMask lists, bool ``[q blocks, kv blocks]`` each.

    Args:
        mask: the block mask.
        by: ``"kv"`` for the lists of each query block, ``"q"`` for those of each key-value block, which the backward
            kernels walk.
    """
    q_blocks, kv_blocks = mask.kv_num_blocks.shape[-1], -(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1])
    columns = kv_blocks if by == "kv" else q_blocks
    part = listed_blocks(getattr(mask, f"{by}_num_blocks"), getattr(mask, f"{by}_indices"), columns)
    full = torch.zeros_like(part)
    if getattr(mask, f"full_{by}_num_blocks") is not None:
        full = listed_blocks(getattr(mask, f"full_{by}_num_blocks"), getattr(mask, f"full_{by}_indices"), columns)
    return (part, full) if by == "kv" else (part.T, full.T)


def assert_lists(mask: BlockMask, reference: Tensor, where: str = "", first_block: int = 0) -> None:
    """Assert that no needed block is missing, no full one is wrong, none is listed twice, and both directions agree.

    Args:
        mask: the block mask.
        reference: the correct mask, bool ``[queries, keys]``, for whole query blocks from ``first_block`` on.
        where: appended to the messages.
        first_block: number of the reference's first query block.
    """
    blocks = blocks_of(reference.cpu(), mask.BLOCK_SIZE)
    every = both_lists(mask, "kv")
    part, full = (lists[first_block : first_block + len(blocks)] for lists in every)
    for found, what in (
        (part & full, "is listed both as full and as partial"),
        (blocks.any(-1).any(-1) & ~(part | full), "is needed and not listed"),
        (full & ~blocks.all(-1).all(-1), "is listed as full and is not"),
    ):
        wrong = torch.nonzero(found)
        if len(wrong):
            q, kv = wrong[0].tolist()
            raise AssertionError(
                f"block (query, key-value) {(first_block + q, kv)} {what}{where}; {len(wrong)} such blocks"
            )
    if mask.q_indices is not None:
        for kind, forward, backward in zip(("partial", "full"), every, both_lists(mask, "q"), strict=True):
            wrong = torch.nonzero(forward != backward)
            assert not len(wrong), (
                f"{kind} block (query, key-value) {tuple(wrong[0].tolist())} is in the lists of one direction "
                f"alone{where}; {len(wrong)} such blocks"
            )
