"""Checks of everything besides the mask: token order, pooled keys, padded text, text attended apart, plans, costs, ranks; all
against the oracle."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexclear.compile.kernels import Kernel
from flexclear.masks import Downsampled, Layout, Window, block_mask, block_pairs, cost, dense_mask, with_text_mask
from flexclear.masks.apart import text_apart
from flexclear.masks.scan import ask
from flexclear.parallel.masks import build_band_plan
from flexclear.parallel.planning import cut, long_axis, part_of, sides
from flexclear.runtime.call_plan import CallPlan, SlotPlan
from flexclear.runtime.plan import build_plan
from flexclear.runtime.pooling import make_pooling
from flexclear.runtime.reach import warn_of_unreached
from flexclear.testing import oracle
from flexclear.testing.lists import assert_lists, blocks_of, both_lists

CPU = torch.device("cpu")
HEADS, HEAD_DIM = 2, 8


def check_order(layout: Layout) -> None:
    """The image order has every token once, grid after grid, and coordinates and inverses match it."""
    order, t, y, x = layout.permutation().numpy(), *oracle.raster_places(layout)
    start = 0
    for height, width in [(layout.height, layout.width), *layout.references]:
        own = np.arange(start, start + layout.frames * height * width)
        assert np.array_equal(np.sort(order[own]), own), (
            f"the order of the grid at token {start} is no permutation of it"
        )
        start += layout.frames * height * width
    assert len(order) == start, f"the order has {len(order)} of {start} image tokens"
    assert np.array_equal(layout.inverse_permutation().numpy()[order], np.arange(start)), "the inverse order is wrong"
    frames, rows, columns = (axis.numpy() for axis in layout.coordinates())
    assert np.array_equal(frames, t[order]), "frames of the image order are wrong"
    assert np.array_equal(rows, y[order]), "rows of the image order are wrong"
    assert np.array_equal(columns, x[order]), "columns of the image order are wrong"
    text = np.full(layout.text_len, -1)
    place = (y << 16 | x if layout.frames == 1 else t << 20 | y << 10 | x)[order]
    packed = [text, place] if layout.text_first else [place, text]
    assert np.array_equal(layout.packed_coordinates().numpy(), np.concatenate(packed)), "packed coordinates are wrong"
    plan = build_plan(layout, None, "sdpa", Kernel((16, 16)), CPU, backward=False)
    tokens = torch.arange(start)
    assert torch.equal(plan.to_image_order(tokens, 0), torch.from_numpy(order)), "a plan's order is wrong"
    call = CallPlan(base=plan, slots=(SlotPlan(None),))
    for way in (plan, call):
        assert torch.equal(way.to_raster(way.to_image_order(tokens, 0), 0), tokens), "tokens do not come back in order"
    assert np.array_equal(plan.rows.numpy(), y[order]), "rows of a plan are wrong"
    assert np.array_equal(plan.columns.numpy(), x[order]), "columns of a plan are wrong"


def check_pooling(layout: Layout, factor: int) -> None:
    """Every token is pooled once, into its own cell at its own place, and equal weights give a mean."""
    window = Downsampled(oracle.Full(), factor)
    rows, columns = oracle.cell_counts(layout, window)
    assert window.pooled_grid(layout) == (rows, columns), (
        f"{window!r} over {layout.height} x {layout.width} has {rows} x {columns} cells, not {window.pooled_grid(layout)}"
    )
    pooling = make_pooling(layout, factor, CPU)
    _, y, x = (axis[layout.permutation().numpy()] for axis in oracle.raster_places(layout))
    share = pooling.share.numpy()
    assert share.shape == (rows * columns, factor**2), f"shares of {rows * columns} cells have shape {share.shape}"
    cell, place = np.nonzero(share)
    member = pooling.members.view(share.shape).numpy()[cell, place]
    assert np.array_equal(np.sort(member), np.arange(len(y))), "pooled keys do not hold every image token once"
    assert np.array_equal(y[member] // factor * columns + x[member] // factor, cell), "a token is in another's cell"
    assert np.array_equal(y[member] % factor * factor + x[member] % factor, place), "a token is at another's place"
    counts = np.bincount(cell, minlength=len(share))
    assert np.allclose(share[cell, place], factor**2 / counts[cell], rtol=1e-6), "shares do not add up to a mean"


def text_masks(layout: Layout) -> Tensor:
    """Three samples of text, bool ``[3, text_len]``: padded on the right, on the left, and in scattered places."""
    generator = torch.Generator().manual_seed(layout.seq_len)
    places = torch.arange(layout.text_len)
    least = layout.text_len // 3
    scattered = torch.rand(layout.text_len, generator=generator) > 0.4
    return torch.stack([places <= layout.text_len - 1 - least, places > least, scattered])


def check_padding(
    layout: Layout, window: Window, block_size: int | tuple[int, int] | None, queries: Tensor, whole: bool
) -> None:
    """No query sees padded text, and nothing else changes.

    Args:
        layout, window, block_size: the case.
        queries: sequence positions to check.
        whole: whether these are all positions, so that block lists and dense masks are also checked.
    """
    keep = text_masks(layout)
    mask = with_text_mask(block_mask(layout, window, block_size=block_size, text_padded=True), layout, keep)
    assert isinstance(mask, BlockMask)
    plain = oracle.expected_rows(layout, window, queries)
    start = 0 if layout.text_first else plain.shape[1] - layout.text_len - _pooled(layout, window)
    expected = plain.repeat(len(keep), 1, 1)
    expected[:, :, start : start + layout.text_len] &= keep[:, None]
    keys = torch.arange(plain.shape[1])
    for sample, right in enumerate(expected):
        answer = mask.mask_mod(torch.tensor(sample), torch.tensor(sample % 2), queries[:, None], keys[None, :])
        assert torch.equal(answer.expand(right.shape), right), f"padding of sample {sample} is wrong in the mask_mod"
        if whole:
            assert_lists(mask, right, f" with the text padding of sample {sample}")
    if whole:
        dense = with_text_mask(dense_mask(layout, window), layout, keep)
        assert isinstance(dense, Tensor)
        assert torch.equal(dense[:, 0], expected), "padding is wrong in the dense mask"


def check_apart(layout: Layout, window: Window, right: Tensor, block_size: tuple[int, int]) -> None:
    """Where text is attended apart, the rows of image queries are right, in the lists and in the ``mask_mod``."""
    apart = text_apart(layout, window, block_size=block_size)
    first = layout.text_len // block_size[0] * block_size[0] if layout.text_first else 0
    rows = apart.image.seq_lengths[0]
    assert rows == apart.rows == (layout.seq_len - first if layout.text_first else layout.image_len), (
        f"with text apart there are {rows} queries"
    )
    assert len(apart.text) == layout.text_len
    part, full = both_lists(apart.image, "kv")
    queries = torch.arange(rows)
    inside = blocks_of(ask(apart.image.mask_mod, queries[:, None], torch.arange(right.shape[1])[None, :]), block_size)
    seen = inside & part[..., None, None] | full[..., None, None]
    # Rows of text that share a block with image queries are meaningless.
    is_image = queries + first >= layout.image_start if layout.text_first else queries < layout.image_len
    of_image = blocks_of(is_image[:, None].expand(rows, right.shape[1]), block_size)
    expected = blocks_of(right[first : first + rows], block_size)
    assert torch.equal(seen & of_image, expected & of_image), "image queries are wrong where text is attended apart"


def _pooled(layout: Layout, window: Window) -> int:
    rows, columns = oracle.cell_counts(layout, window)
    return rows * columns


def check_scan(layout: Layout, right: Tensor, block_size: int | tuple[int, int] | None) -> None:
    """A user's ``mask_mod``, here a table lookup, is classified exactly."""
    pairs = block_pairs(layout, lambda b, h, q_idx, kv_idx: right[q_idx, kv_idx], block_size)
    blocks = blocks_of(right, pairs.block_size)
    found, full = torch.zeros(2, pairs.q_blocks, pairs.kv_blocks, dtype=torch.bool)
    found[pairs.q, pairs.kv] = True
    full[pairs.q[pairs.full], pairs.kv[pairs.full]] = True
    assert torch.equal(found, blocks.any(-1).any(-1)), "blocks of a mask_mod of one's own are wrong"
    assert torch.equal(full, blocks.all(-1).all(-1)), "full blocks of a mask_mod of one's own are wrong"


def check_cost(layout: Layout, window: Window, right: Tensor, block_size: int | tuple[int, int] | None) -> None:
    """The cost counts the allowed pairs."""
    counted, allowed = cost(layout, window, block_size=block_size).pairs, int(right.sum())
    assert counted == allowed, f"the cost counts {counted} pairs of {allowed}"


def check_attend(layout: Layout, window: Window, right: Tensor) -> None:
    """Attention of a plan with masked SDPA, including pooled keys, matches softmax in NumPy for some queries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = build_plan(layout, window, "sdpa", Kernel((16, 16)), CPU, backward=False)
    assert isinstance(plan.mask, Tensor)
    assert torch.equal(plan.mask, right), "the dense mask of a plan is wrong"
    generator = torch.Generator().manual_seed(layout.seq_len)
    shape = 1, HEADS, layout.seq_len, HEAD_DIM
    query, key, value = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    factor = window.factor if isinstance(window, Downsampled) else 0
    weight = torch.rand(factor**2, generator=generator, dtype=torch.float64) / factor**2 if factor else None
    call = CallPlan(base=plan, slots=(SlotPlan(plan.mask, plan.pooling),))
    ours = call.attend(0, query, key, value, weight)[0].numpy()
    keys, values = key[0].numpy(), value[0].numpy()
    if weight is not None:
        keys, values = (_with_pooled(layout, tokens, factor, weight.numpy()) for tokens in (keys, values))
    some = np.unique(np.linspace(0, layout.seq_len - 1, 64).astype(int))
    scores = np.where(right.numpy()[some], query[0].numpy()[:, some] @ keys.swapaxes(1, 2) / HEAD_DIM**0.5, -np.inf)
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    expected = exponents / exponents.sum(-1, keepdims=True) @ values
    error = abs(ours[:, some] - expected).max()
    # Shares of cells are float32, everything else is float64. So keys and values may be off by one rounding, and scores by as
    # much as the rounded keys can move them, which moves the output by up to twice that times the largest value.
    largest = (abs(query[0].numpy()[:, some]) @ abs(keys).swapaxes(1, 2)).max() / HEAD_DIM**0.5
    allowance = np.finfo(np.float32).eps / 2 * abs(values).max() * (1 + 2 * largest)
    assert error <= allowance, f"attention of a plan is off by {error:.2e}, more than {allowance:.0e}"


def _with_pooled(layout: Layout, tokens: np.ndarray, factor: int, weight: np.ndarray) -> np.ndarray:
    """Keys or values ``[heads, N, head_dim]``, followed by the pooled ones, cell by cell."""
    first = layout.text_len if layout.text_first else 0
    image = tokens[:, first : first + layout.height * layout.width]
    grid = np.empty((layout.height, layout.width, *tokens.shape[::2]))
    _, y, x = (axis[layout.permutation().numpy()] for axis in oracle.raster_places(layout))
    grid[y, x] = image.swapaxes(0, 1)
    weights = weight.reshape(factor, factor, 1, 1)
    pooled = []
    for top in range(0, layout.height, factor):
        for left in range(0, layout.width, factor):
            cell = grid[top : top + factor, left : left + factor]
            rows, columns = cell.shape[:2]
            pooled.append((cell * weights[:rows, :columns]).sum((0, 1)) * factor**2 / (rows * columns))
    return np.concatenate([tokens, np.stack(pooled, 1)], 1)


def check_ranks(layout: Layout, window: Window, block_size: int | tuple[int, int]) -> None:
    """A rank's mask equals its rows of the whole mask, and none of its queries sees a key that it lacks."""
    longest = max(sides(layout, long_axis(layout)))
    if longest < 16:
        return
    size = (block_size, block_size) if isinstance(block_size, int) else block_size
    bands = cut(layout, min(3, longest // 8), too_small="fewer")
    rank = layout.seq_len % bands.ranks
    part = part_of(layout, window, bands, rank)
    if len(part.own) == 0:
        return
    raster = Layout(layout.height, layout.width, layout.text_len, True, "raster", layout.references)
    text, image = layout.text_len, layout.image_len
    whole = oracle.expected_rows(raster, window, text + part.own)
    pooled = torch.arange(text + image, whole.shape[1])
    columns = torch.cat([text + part.own, torch.arange(text), text + part.halo, pooled])
    missing = torch.ones(whole.shape[1], dtype=torch.bool)
    missing[columns] = False
    right = whole[:, columns]
    assert not whole[:, missing].any(), f"rank {rank} of {bands} lacks keys that its queries see"
    keep = text_masks(layout)[1:2]
    padded = right.clone()
    padded[:, len(part.own) : len(part.own) + text] &= keep
    for backend in ("flex", "sdpa"):
        plan = build_band_plan(layout, window, bands, rank, backend, Kernel(size), CPU, text_padded=True)
        for kept, expected in ((torch.ones_like(keep), right), (keep, padded)):
            mask = plan.masked(kept)
            if isinstance(mask, Tensor):
                assert torch.equal(mask.expand(1, 1, *right.shape)[0, 0], expected), f"the mask of rank {rank} is wrong"
                continue
            assert isinstance(mask, BlockMask)
            q_idx, kv_idx = torch.arange(right.shape[0])[:, None], torch.arange(right.shape[1])[None, :]
            assert torch.equal(ask(mask.mask_mod, q_idx, kv_idx), expected), f"the mask_mod of rank {rank} is wrong"
            assert_lists(mask, expected, f" of rank {rank}")


def check_reach(layout: Layout, window: Window) -> None:
    """There is a warning for each reference grid that the image's far corner does not see at all."""
    if not isinstance(window, oracle.SIMPLE):
        return  # Composed windows are evaluated on boxes, which may be too wide.
    hidden = 0
    zero = np.array(0)
    corner = zero, np.array(layout.height - 1), np.array(layout.width - 1)
    for rows, columns in layout.references:
        hidden += not oracle.sees(
            window, layout, corner, (zero, np.arange(rows)[:, None], np.arange(columns)[None, :])
        ).any()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_unreached(layout, window)
    assert len(caught) == hidden, f"{len(caught)} reference images are said to be out of reach, and {hidden} are"
