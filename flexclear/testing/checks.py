"""``assert_matches_dense``: a block mask and the attention under it against the dense reference, everything at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexclear.compile import compiled_flex_attention
from flexclear.masks import Layout, MaskMod, Window, block_mask, dense_mask
from flexclear.masks.scan import ask

Builder = Callable[..., BlockMask]
"""Called as ``block_mask`` is: ``(layout, window, *, block_size, device, backward) -> BlockMask``."""

HEADS, HEAD_DIM = 2, 16


def blocks_of(mask: Tensor, block_size: tuple[int, int]) -> Tensor:
    """A dense mask cut into blocks, padded with False: bool ``[q blocks, kv blocks, Q, KV]``."""
    rows, columns = (-(-length // size) for length, size in zip(mask.shape, block_size, strict=True))
    padded = mask.new_zeros(rows * block_size[0], columns * block_size[1])
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded.view(rows, block_size[0], columns, block_size[1]).transpose(1, 2)


def listed_blocks(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """The blocks that a BlockMask's lists name: bool ``[rows, columns]``."""
    counts, indices = counts[0, 0].cpu(), indices[0, 0].cpu().long()
    named = torch.arange(indices.shape[-1])[None, :] < counts[:, None]
    found = torch.zeros(len(counts), columns, dtype=torch.bool)
    rows = torch.arange(len(counts))[:, None].expand_as(indices)
    found[rows[named], indices[named]] = True
    return found


def assert_matches_dense(
    layout: Layout,
    window: Window | MaskMod,
    *,
    block_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: bool = True,
    reference: Tensor | None = None,
    build: Builder = block_mask,
) -> None:
    """Assert that the block mask of ``window`` over ``layout`` means what the dense reference means.

    Checks the ``mask_mod`` on every pair, the block lists (no needed block missing, no full block wrong, none named
    twice), and compiled FlexAttention against masked SDPA in float32 (float32: 1e-5 absolute; other types: twice the
    error of masked SDPA in that type). On CUDA also the log-sum-exp and the gradients.

    >>> from flexclear.masks import Disc
    >>> assert_matches_dense(Layout(9, 14, text_len=5), Disc(3), block_size=32, attention=False)

    Args:
        layout: the sequence.
        window: a window, or a ``mask_mod`` of your own over the layout's sequence positions.
        block_size: tokens per block, or a (query, key-value) pair.
        dtype: of query, key and value.
        device: where it runs.
        attention: whether to run attention too; False checks the mask alone, in milliseconds.
        reference: what is right, bool ``[seq_len, keys]`` in sequence order; ``dense_mask`` by default. For a
            ``mask_mod`` of your own, give one that does not come from it.
        build: what makes the block mask; ``flexclear.masks.block_mask`` by default.

    Raises:
        AssertionError: they differ; the message says where.
    """
    reference = dense_mask(layout, window, device=device) if reference is None else reference.to(device)
    mask = build(layout, window, block_size=block_size, device=device, backward=torch.device(device).type == "cuda")
    _check_mask_mod(mask, reference)
    _check_lists(mask, reference)
    if attention:
        _check_attention(mask, reference, dtype, device)


def _check_mask_mod(mask: BlockMask, reference: Tensor) -> None:
    assert mask.seq_lengths == tuple(reference.shape), (
        f"the block mask is for {mask.seq_lengths} queries and keys, the reference for {tuple(reference.shape)}"
    )
    queries, keys = (torch.arange(length, device=reference.device) for length in reference.shape)
    wrong = torch.nonzero(ask(mask.mask_mod, queries[:, None], keys[None, :]) != reference)
    if len(wrong):
        q, kv = wrong[0].tolist()
        raise AssertionError(
            f"mask_mod is wrong for {len(wrong)} of {reference.numel()} pairs, first for query {q} and key {kv}: "
            f"the reference says {bool(reference[q, kv])}"
        )


def _check_lists(mask: BlockMask, reference: Tensor) -> None:
    blocks = blocks_of(reference.cpu(), mask.BLOCK_SIZE)
    columns = blocks.shape[1]
    part = listed_blocks(mask.kv_num_blocks, mask.kv_indices, columns)
    full = torch.zeros_like(part)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = listed_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
    for found, what in (
        (part & full, "is listed both as full and as partial"),
        (blocks.any(-1).any(-1) & ~(part | full), "is needed and not listed"),
        (full & ~blocks.all(-1).all(-1), "is listed as full and is not"),
    ):
        wrong = torch.nonzero(found)
        assert not len(wrong), f"block (query, key-value) {tuple(wrong[0].tolist())} {what}; {len(wrong)} such blocks"


def _check_attention(mask: BlockMask, reference: Tensor, dtype: torch.dtype, device: torch.device | str) -> None:
    generator = torch.Generator().manual_seed(sum(reference.shape))

    def noise(length: int) -> Tensor:
        return torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).to(device, dtype)

    query, key, value = noise(reference.shape[0]), noise(reference.shape[1]), noise(reference.shape[1])
    expected = _sdpa(query.float(), key.float(), value.float(), reference)
    with torch.no_grad():
        ours = compiled_flex_attention(query, key, value, mask)
    allowance = _sdpa(query, key, value, reference)
    _check_near("the output", ours, expected, allowance)
    if torch.device(device).type == "cuda":
        _check_log_sum_exp(query, key, value, mask, reference)
        _check_gradients(query, key, value, mask, reference)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, reference: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=reference)


def _check_near(what: str, ours: Tensor, expected: Tensor, allowance: Tensor) -> None:
    """Near in absolute terms for float32; else no further from float32 than twice what the type's own SDPA is."""
    error = (ours.float() - expected).abs().max()
    if ours.dtype == torch.float32 and ours.device.type == "cpu":
        assert error <= 1e-5, f"{what} of compiled attention is off by {error:.2e}"
        return
    relative = (ours.float() - expected).norm() / expected.norm()
    rounding = (allowance.float() - expected).norm() / expected.norm()
    assert relative <= 2 * rounding + 1e-3, (
        f"{what} of compiled attention is off by {relative:.2e}, masked SDPA in {ours.dtype} by {rounding:.2e}"
    )


def _check_log_sum_exp(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, reference: Tensor) -> None:
    from torch.nn.attention.flex_attention import AuxRequest

    def with_log_sum_exp(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Any:
        return flex_attention(query, key, value, block_mask=mask, return_aux=AuxRequest(lse=True))

    _, aux = torch.compile(with_log_sum_exp, fullgraph=True, dynamic=True)(query, key, value, mask)
    scores = query.float() @ key.float().transpose(-1, -2) / HEAD_DIM**0.5
    expected = scores.masked_fill(~reference, float("-inf")).logsumexp(-1)
    error = (aux.lse.float() - expected).abs().max()
    assert error <= 2e-2, f"the log-sum-exp of compiled attention is off by {error:.2e}"


def _check_gradients(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, reference: Tensor) -> None:
    inputs = [t.detach().requires_grad_() for t in (query, key, value)]
    exact = [t.detach().float().requires_grad_() for t in (query, key, value)]
    rounded = [t.detach().requires_grad_() for t in (query, key, value)]
    compiled_flex_attention(inputs[0], inputs[1], inputs[2], mask).float().square().sum().backward()
    for tensors in (exact, rounded):
        _sdpa(tensors[0], tensors[1], tensors[2], reference).float().square().sum().backward()
    for name, ours, expected, allowance in zip(("query", "key", "value"), inputs, exact, rounded, strict=True):
        assert ours.grad is not None
        assert expected.grad is not None
        assert allowance.grad is not None
        _check_near(f"the gradient of {name}", ours.grad, expected.grad, allowance.grad)
