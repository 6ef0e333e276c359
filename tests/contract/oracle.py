"""What is right: the stock model of diffusers, in raster order, whose attention gets the dense boolean mask of the window.

All attention of diffusers ends in ``scaled_dot_product_attention`` on a CPU, whatever leads there, so that is where the
mask comes in: projections, norms, positions and the model's own masks of padded text stay diffusers'. The window is
written out here from its definition; nothing of flexclear is used.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import FRAME_RADIUS, Row
from .shapes import Shape

RADIUS = 3

TOLERANCE = 2.0**-17
"""Of the largest output. Both sides are float32 and sum in another order: some sixteen operations a block, each rounding to
2^-24 of its largest value, in four blocks, are 2^-18; measured 2^-22 to 2^-20.8."""

MATTERS = 2.0**-10
"""Of the largest output: what must make a difference makes more than this; a radius of one more token makes 2^-8 or more."""


def window(shape: Shape, text_len: int, text_first: bool, r: int) -> Tensor:
    """Bool ``[N, N]``, raster order: text sees all and is seen by all; image tokens see those closer than ``r``, of a video
    in frames not further than ``FRAME_RADIUS``."""
    grids, frames = ((shape.height, shape.width), *shape.references), torch.arange(shape.frames or 1)
    places = torch.cat([torch.cartesian_prod(frames, torch.arange(h), torch.arange(w)) for h, w in grids])
    apart = (places[:, None] - places[None]).abs()
    near = (apart[..., 1:].square().sum(-1) < r * r) & (apart[..., 0] <= FRAME_RADIUS)
    text = (text_len, 0) if text_first else (0, text_len)
    return F.pad(near, (*text, *text), value=True)


def _adjoining(shape: Shape, attn_mask: Tensor, image_len: int, r: int) -> Tensor:
    """Bool ``[B, 1, N, N]``: the window of each sample, whose image follows its own text, and its padding the image."""
    masks = []
    for text_len in (attn_mask.flatten(1).sum(1) - image_len).tolist():
        padding = attn_mask.shape[-1] - text_len - image_len
        masks.append(F.pad(window(shape, text_len, True, r), (0, padding, 0, padding), value=True))
    return torch.stack(masks)[:, None]


@contextlib.contextmanager
def under(
    row: Row,
    shape: Shape,
    r: int = RADIUS,
    *,
    down_factor: int | None = None,
    proportional: bool = False,
    padding: bool = True,
    all_used: bool = True,
) -> Iterator:
    """diffusers' attention under the window, wherever its sequence is one that the row names.

    Args:
        row, shape: whose call.
        r: radius.
        down_factor: side of the cells whose mean key and value the image sees as well.
        proportional: scores scaled by sqrt(log_4608(keys)) besides.
        padding: whether the model's own mask of padded text counts.
        all_used: whether each of those sequences must be attended over.
    """
    shape = row.fitted(shape)
    image_len = (shape.frames or 1) * sum(h * w for h, w in ((shape.height, shape.width), *shape.references))
    windows = {image_len + text: window(shape, text, row.text_first, r) for text in row.text_lens(shape)}
    for part in row.parts(shape):
        alone = window(part, 0, row.text_first, r)
        windows[len(alone)] = alone
    assert not windows.keys() & set(row.other_lens(shape)), f"lengths do not tell the sequences of {shape} apart"
    plain, used = F.scaled_dot_product_attention, set()

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options):
        length = key.shape[-2]
        mask = windows.get(length)
        if mask is None or (row.alone and query.shape[-2] != length):
            return plain(query, key, value, attn_mask=attn_mask, **options)
        used.add(length)
        mask = mask[-query.shape[-2] :]  # or of the image's rows alone
        if row.adjoins and attn_mask is not None:
            mask = _adjoining(shape, attn_mask, image_len, r)
        if attn_mask is None or not padding:
            pass
        elif attn_mask.dtype == torch.bool:
            mask = mask & attn_mask
        else:
            mask = attn_mask.masked_fill(~mask, -math.inf)
        if down_factor is not None:
            text_len = length - image_len
            assert row.text_first
            pooled = [_cells(t[:, :, text_len:], shape, down_factor) for t in (key, value)]
            key, value = (torch.cat(parts, 2) for parts in zip((key, value), pooled, strict=True))
            sees = (torch.arange(length) >= text_len)[:, None].expand(-1, pooled[0].shape[2])
            mask = torch.cat([mask, sees], 1)
        if proportional:
            keys = image_len + shape.text_len if row.ragged else length  # with the padding, as elsewhere
            options["scale"] = math.sqrt(math.log(keys, 4608) / query.shape[-1])
        return plain(query, key, value, attn_mask=mask, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield
    assert used == set(windows) or not all_used, (
        f"of the sequences {sorted(windows)} only {sorted(used)} were attended over"
    )


@contextlib.contextmanager
def windowed(row: Row, model, shape: Shape, r: int = RADIUS) -> Iterator[None]:
    """The same for one stock model wherever it is called, in a pipeline whose other parts stay dense."""
    plain = model.forward

    @functools.wraps(plain)  # modular pipelines ask for its signature
    def forward(*args, **kwargs):
        with under(row, shape, r):
            return plain(*args, **kwargs)

    with mock.patch.object(model, "forward", forward):
        yield


def _cells(image: Tensor, shape: Shape, side: int) -> Tensor:
    """The mean of each cell of ``side`` x ``side`` tokens, cut-off ones too, of ``[B, heads, tokens, head_dim]``."""
    grid = image.unflatten(2, (shape.height, shape.width)).movedim(-1, 2)
    means = F.avg_pool2d(grid.flatten(0, 1), side, ceil_mode=True, count_include_pad=False)
    return means.unflatten(0, grid.shape[:2]).flatten(3).movedim(2, -1)


def stacked(output) -> Tensor:
    """A model's output as one tensor."""
    sample = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(sample) if isinstance(sample, list) else sample


def run(model, call) -> Tensor:
    """The output, without gradients."""
    with torch.no_grad():
        return stacked(model(**call))


def expected(row: Row, model, shape: Shape, call=None, r: int = RADIUS, **options) -> Tensor:
    """What the stock ``model`` gives under the window."""
    if row.ragged and not options.pop("padding", True):
        shape = dataclasses.replace(shape, padding=None)
    with under(row, shape, r, **options):
        return run(model, row.call(shape) if call is None else call)


def differ(one: Tensor, other: Tensor) -> float:
    """The greatest difference in units of the largest output."""
    return ((one - other).abs().max() / other.abs().max()).item()


def same(one: Tensor, other: Tensor, what: object = "") -> None:
    """Assert that two outputs are equal but for rounding."""
    assert one.shape == other.shape, what
    assert differ(one, other) <= TOLERANCE, (what, differ(one, other))


def far(one: Tensor, other: Tensor, what: object) -> None:
    """Assert that two outputs differ by far more than rounding, in every sample."""
    for sample, (mine, others) in enumerate(zip(one, other, strict=True)):
        assert differ(mine, others) > MATTERS, f"{what} makes no difference here (sample {sample})"


def gradients(model, call) -> list[Tensor | None]:
    """Of all parameters, by a loss to which every output counts."""
    model.zero_grad()
    stacked(model(**call)).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def twins(row: Row, **config):
    """Two models of equal weights: one to be transformed, and the stock one."""
    original = row.build(**config)
    return copy.deepcopy(original), original
