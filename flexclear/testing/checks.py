"""``assert_matches_dense``: checks a block mask and the attention under it against the dense reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexclear.compile import compiled_flex_attention
from flexclear.compile.flex import options_for
from flexclear.compile.kernels import as_dict
from flexclear.masks import Downsampled, Layout, MaskMod, Window, block_mask, dense_mask
from flexclear.masks.apart import can_part
from flexclear.masks.scan import ask
from flexclear.masks.windows import as_window, is_plain
from flexclear.runtime.attention import masked_sdpa
from flexclear.testing import oracle, sequence
from flexclear.testing.lists import assert_lists

Builder = Callable[..., BlockMask]
"""Called like ``block_mask``: ``(layout, window, *, block_size, device, backward) -> BlockMask``. The mask has lists in
both directions if ``backward`` is True."""

HEADS, HEAD_DIM = 2, 16
MAX_DENSE_PAIRS = 1 << 22
"""Number of pairs (queries times keys) up to which every pair is checked."""


def assert_matches_dense(
    layout: Layout,
    window: Window | MaskMod,
    *,
    block_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    head_dim: int = HEAD_DIM,
    device: torch.device | str = "cpu",
    attention: bool = True,
    around: bool = True,
    reference: Tensor | None = None,
    build: Builder = block_mask,
) -> None:
    """Assert that the block mask of ``window`` over ``layout`` agrees with the dense reference.

    Checks the ``mask_mod`` on every pair, the block lists in both directions (no needed block missing, no full block wrong,
    none listed twice), and compiled FlexAttention against masked SDPA in float32 (float32: 1e-5 absolute; other types: twice
    the error of masked SDPA in that type). On CUDA, also checks the log-sum-exp and the gradients.

    The windows of ``flexclear.masks`` are compared with their definitions (``flexclear.testing.oracle``). So is everything else
    that is derived from a layout and a window: token order and its inverse, coordinates from tables, pooled keys, padded text,
    text attended apart, the dense mask, costs, masked SDPA, and the masks of ranks that share an image. Beyond 4,194,304 pairs,
    only the rows of some query blocks are compared, and attention is skipped.

    >>> from flexclear.masks import Disc
    >>> assert_matches_dense(Layout(9, 14, text_len=5), Disc(3), block_size=32, attention=False)

    Args:
        layout: the sequence.
        window: a window, or a ``mask_mod`` of your own over the layout's sequence positions.
        block_size: tokens per block, or a (query, key-value) pair.
        dtype, head_dim: those of query, key and value.
        device: where to run.
        attention: whether to run compiled attention as well.
        around: whether to check what is derived besides the mask. Without it and without attention, a small case takes
            milliseconds.
        reference: the correct mask, bool ``[seq_len, keys]`` in sequence order. By default the window's definition; for your
            own windows and ``mask_mod`` functions, ``dense_mask``: pass a reference that is not derived from them.
        build: the function that makes the block mask; ``flexclear.masks.block_mask`` by default. With another one, only the
            mask and the attention are checked, as without ``around``.

    Raises:
        AssertionError: they differ; the message says where.
    """
    defined = None if reference is not None or is_plain(window) else as_window(window)
    around = around and build is block_mask and oracle.knows(defined)
    if around:
        sequence.check_order(layout)
    mask = build(layout, window, block_size=block_size, device=device, backward=True)
    if defined is None or not oracle.knows(defined):
        reference = dense_mask(layout, window, device=device) if reference is None else reference
        _check_mask(mask, reference.to(device))
    elif mask.seq_lengths[0] * mask.seq_lengths[1] > MAX_DENSE_PAIRS:
        _check_some_rows(layout, defined, mask, around)
        if around:
            _check_around(layout, defined, mask, None)
        return
    else:
        reference = oracle.expected_rows(layout, defined)
        _check_mask(mask, reference.to(device))
        if around:
            _check_around(layout, defined, mask, reference)
    if attention:
        _check_attention(mask, reference.to(device), dtype, device, head_dim)


def _check_mask(mask: BlockMask, reference: Tensor) -> None:
    assert mask.seq_lengths == tuple(reference.shape), (
        f"the block mask is for {mask.seq_lengths} queries and keys, the reference for {tuple(reference.shape)}"
    )
    _check_mask_mod(mask.mask_mod, reference)
    assert_lists(mask, reference)


def _check_around(layout: Layout, window: Window, mask: BlockMask, reference: Tensor | None) -> None:
    """Check what is derived besides the mask, on CPU; more of it in a small case, which has a dense reference."""
    size = (mask.BLOCK_SIZE[0], mask.BLOCK_SIZE[1])
    if layout.references:
        sequence.check_reach(layout, window)
    elif layout.frames == 1:
        sequence.check_pooling(layout, window.factor if isinstance(window, Downsampled) else 3)
    if reference is None:
        last = layout.seq_len - 1
        sequence.check_padding(layout, window, size, torch.tensor([0, last // 2, last]), whole=False)
        return
    for name, mask_mod in _from_tables(layout, window).items():
        _check_mask_mod(mask_mod, reference, name=name)
    sequence.check_padding(layout, window, size, torch.arange(layout.seq_len), whole=True)
    if can_part(layout, window):
        sequence.check_apart(layout, window, reference, size)
    sequence.check_cost(layout, window, reference, size)
    sequence.check_attend(layout, window, reference)
    if layout.frames == 1:
        sequence.check_ranks(layout, window, size)
    if not isinstance(window, Downsampled):
        sequence.check_scan(layout, reference, size)


def _from_tables(layout: Layout, window: Window) -> dict[str, MaskMod]:
    """The window's ``mask_mod`` with coordinates from tables, as on CUDA, where the default on CPU computes them."""
    return {
        f"mask_mod with coordinates {source!r}": window.mask_mod(layout, coordinates=source)
        for source in ("packed", "separate")
    }


def _check_some_rows(layout: Layout, window: Window, mask: BlockMask, tables: bool) -> None:
    """Check the rows of some query blocks: the first and last, and those where image and text meet and where 16 bits end.

    Args:
        layout, window, mask: the case.
        tables: whether to check coordinates from tables as well.
    """
    others = _from_tables(layout, window) if tables else {}
    length, size = mask.seq_lengths[0], mask.BLOCK_SIZE[0]
    generator = torch.Generator().manual_seed(length)
    places = [0, length - 1, layout.image_start, min(1 << 16, length - 1)]
    places += torch.randint(length, (2,), generator=generator).tolist()
    for block in sorted({place // size for place in places}):
        queries = torch.arange(block * size, min((block + 1) * size, length))
        reference = oracle.expected_rows(layout, window, queries).to(mask.kv_indices.device)
        assert mask.seq_lengths[1] == reference.shape[1], (
            f"the block mask is for {mask.seq_lengths[1]} keys, the reference for {reference.shape[1]}"
        )
        _check_mask_mod(mask.mask_mod, reference, block * size)
        for name, mask_mod in others.items():
            _check_mask_mod(mask_mod, reference.cpu(), block * size, name)
        assert_lists(mask, reference, first_block=block)


def _check_mask_mod(mask_mod: MaskMod, reference: Tensor, first: int = 0, name: str = "mask_mod") -> None:
    """Check the ``mask_mod`` for the reference's queries, starting with query ``first``, and all keys."""
    queries, keys = (torch.arange(length, device=reference.device) for length in reference.shape)
    wrong = torch.nonzero(ask(mask_mod, first + queries[:, None], keys[None, :]) != reference)
    if len(wrong):
        q, kv = wrong[0].tolist()
        raise AssertionError(
            f"{name} is wrong for {len(wrong)} of {reference.numel()} pairs, first for query {first + q} and key {kv}: "
            f"the reference says {bool(reference[q, kv])}"
        )


def _check_attention(
    mask: BlockMask, reference: Tensor, dtype: torch.dtype, device: torch.device | str, head_dim: int
) -> None:
    generator = torch.Generator().manual_seed(sum(reference.shape))

    def noise(length: int) -> Tensor:
        return torch.randn(1, HEADS, length, head_dim, generator=generator).to(device, dtype)

    query, key, value = noise(reference.shape[0]), noise(reference.shape[1]), noise(reference.shape[1])
    expected = masked_sdpa(query.float(), key.float(), value.float(), reference)
    with torch.no_grad():
        ours = compiled_flex_attention(query, key, value, mask)
    allowance = masked_sdpa(query, key, value, reference)
    _check_near("the output", ours, expected, allowance)
    if torch.device(device).type == "cuda":
        _check_log_sum_exp(query, key, value, mask, reference)
        _check_gradients(query, key, value, mask, reference)


def _check_near(what: str, ours: Tensor, expected: Tensor, allowance: Tensor) -> None:
    """For float32, check the absolute error; otherwise allow twice the error that SDPA in the same type has to float32."""
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

    options = as_dict(options_for(query, mask, needs_grad=False))

    def with_log_sum_exp(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Any:
        return flex_attention(
            query, key, value, block_mask=mask, kernel_options=options, return_aux=AuxRequest(lse=True)
        )

    _, aux = torch.compile(with_log_sum_exp, fullgraph=True, dynamic=True)(query, key, value, mask)
    scores = query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5
    expected = scores.masked_fill(~reference, float("-inf")).logsumexp(-1)
    error = (aux.lse.float() - expected).abs().max()
    assert error <= 2e-2, f"the log-sum-exp of compiled attention is off by {error:.2e}"


def _check_gradients(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, reference: Tensor) -> None:
    inputs = [t.detach().requires_grad_() for t in (query, key, value)]
    exact = [t.detach().float().requires_grad_() for t in (query, key, value)]
    rounded = [t.detach().requires_grad_() for t in (query, key, value)]
    compiled_flex_attention(inputs[0], inputs[1], inputs[2], mask).float().square().sum().backward()
    for tensors in (exact, rounded):
        masked_sdpa(tensors[0], tensors[1], tensors[2], reference).float().square().sum().backward()
    for name, ours, expected, allowance in zip(("query", "key", "value"), inputs, exact, rounded, strict=True):
        assert ours.grad is not None
        assert expected.grad is not None
        assert allowance.grad is not None
        _check_near(f"the gradient of {name}", ours.grad, expected.grad, allowance.grad)
