"""Marks on sizes that change with the number of text tokens, so that no graph is compiled for a single length."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexclear.masks.carried import LENGTHS
from flexclear.masks.defaults import independent


@independent
def of_any_text_length(mask: BlockMask | Tensor) -> BlockMask | Tensor:
    """``mask`` with its sizes marked as symbols, even for a compiler that is set to compile each size separately.

    Args:
        mask: a BlockMask, or a dense bool tensor ``[..., queries, keys]``.
    """
    if isinstance(mask, Tensor):
        mark_symbolic(mask, [dim for dim in (mask.ndim - 2, mask.ndim - 1) if mask.shape[dim] > 1])
        return mask
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, indices = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
        if counts is not None:
            mark_symbolic(counts, [2])
            mark_symbolic(indices, [2, 3])
    # Dynamo compiles in the ints of seq_lengths, but treats the sizes of a tensor as symbols.
    lengths = torch.empty(*mask.seq_lengths, 0, device=mask.kv_indices.device)
    mark_symbolic(lengths, [0, 1])
    setattr(mask, LENGTHS, lengths)
    return mask


def mark_symbolic(tensor: Tensor, dims: Sequence[int]) -> None:
    """Ask Dynamo to treat these sizes as symbols if it can; a graph that needs a fixed size may still fix it."""
    marked: set[int] | None = getattr(tensor, "_dynamo_weak_dynamic_indices", None)
    if marked is not None and marked.issuperset(dims):
        return
    if _by_dynamo(tensor):
        torch._dynamo.maybe_mark_dynamic(tensor, list(dims))
    else:
        _mark(tensor, "_dynamo_weak_dynamic_indices", dims)


def mark_static(tensor: Tensor) -> None:
    """Ask Dynamo to compile in the sizes of ``tensor`` as constants."""
    if _by_dynamo(tensor):
        torch._dynamo.mark_static(tensor)
    else:
        _mark(tensor, "_dynamo_static_indices", range(tensor.ndim))


def _by_dynamo(tensor: Tensor) -> bool:
    """Whether Dynamo's own functions are to mark it: a subclass, whose inner tensors get marks, too."""
    return type(tensor) is not Tensor and "torch._dynamo" in sys.modules


def _mark(tensor: Tensor, name: str, dims: Iterable[int]) -> None:
    """Set the marks that Dynamo's own functions leave on a tensor (``tests/masks/test_lengths.py`` compares them). Importing
    Dynamo for this would delay the first mask by a second, even for users who never compile; and every block of a compiled
    model has marks set in every call."""
    marked = getattr(tensor, name, None)
    if marked is None:
        setattr(tensor, name, set(dims))
    else:
        marked.update(dims)
    tensor._has_dynamo_dim_marking = True  # type: ignore[attr-defined]
