"""What one resolution needs in every step: the mask, the token order, the exact coordinates. Built once and cached."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexclear.compile.kernels import Kernel, with_kernel
from flexclear.masks import Downsampled, Layout, Window, block_mask, dense_mask, with_text_mask
from flexclear.masks.apart import TextApart, can_part, text_apart
from flexclear.masks.cache import ByteBoundedCache
from flexclear.masks.defaults import independent
from flexclear.masks.lengths import mark_symbolic, of_any_text_length
from flexclear.masks.windows import captured_tensors
from flexclear.runtime.attention import Mask
from flexclear.runtime.pooling import Pooling, make_pooling
from flexclear.runtime.reach import warn_of_depth, warn_of_unreached

MAX_DENSE_BYTES = 1 << 32
"""Size in bytes of the largest dense boolean mask that masked SDPA may use."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a model's entry, attention layers and exit need for one layout on one device.

    Attributes:
        layout: the sequence.
        mask: BlockMask, ``TextApart``, bool ``[N, keys]`` for masked SDPA, or None for dense attention.
        order: raster index at each place of the image order, int64 ``[image_len]``; None if the image order is raster order.
        inverse: its inverse, or None.
        rows, columns: coordinates in image order, float32 ``[image_len]``.
        pooling: where the window's pooled keys come from; None if it has none.
    """

    layout: Layout
    mask: Mask
    order: Tensor | None
    inverse: Tensor | None
    rows: Tensor
    columns: Tensor
    pooling: Pooling | None = None

    def to_image_order(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Raster tokens into the layout's order along ``dim``."""
        return tokens if self.order is None else tokens.index_select(dim, self.order)

    def to_raster(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Tokens in the layout's order back into raster order along ``dim``."""
        return tokens if self.inverse is None else tokens.index_select(dim, self.inverse)

    @functools.cached_property
    @independent
    def whole_order(self) -> tuple[Tensor, Tensor] | None:
        """The permutation of the whole sequence, text included, from raster order, and its inverse, int64 ``[seq_len]``; None if
        the image order is raster order."""
        if self.order is None or self.inverse is None:
            return None
        there = self.layout.whole_permutation().to(self.order.device)
        back = torch.argsort(there)
        for order in (there, back):
            mark_symbolic(order, [0])
        return there, back

    def packed_order(self, start: int) -> tuple[Tensor, Tensor] | None:
        """``whole_order`` for a sequence whose image begins at ``start``, with text before and after it. In the plan's sequence
        text comes first."""
        if start == self.layout.text_len:
            return self.whole_order
        if start not in self._packed_orders:
            self._packed_orders[start] = self._make_packed_order(start)
        return self._packed_orders[start]

    @functools.cached_property
    def _packed_orders(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    @independent
    def _make_packed_order(self, start: int) -> tuple[Tensor, Tensor]:
        count = self.layout.image_len
        places = torch.arange(self.layout.seq_len, device=self.rows.device)
        raster = places[start : start + count]
        image = raster if self.order is None else raster[self.order]
        there = torch.cat([places[:start], places[start + count :], image])
        back = torch.empty_like(there).scatter_(0, there, places)
        for order in (there, back):
            mark_symbolic(order, [0])
        return there, back

    def adjoining_order(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """``whole_order`` for samples whose image directly follows the text that they ``keep``, with their padding behind the
        image: int64 ``[B, seq_len]``. ``keep`` is bool ``[B, text_len]``. In the plan's sequence text comes first."""
        lengths, image_len = keep.sum(1, keepdim=True), self.layout.image_len
        text = torch.arange(self.layout.text_len, device=keep.device)
        image = torch.arange(image_len, device=keep.device) if self.order is None else self.order
        there = torch.cat([text + image_len * (text >= lengths), lengths + image], dim=1)
        back = torch.empty_like(there).scatter_(
            1, there, torch.arange(there.shape[1], device=keep.device).expand_as(there)
        )
        for order in (there, back):
            mark_symbolic(order, [1])
        return there, back

    def masked(self, keep: Tensor) -> BlockMask | Tensor | None:
        """The mask without the text keys that are padding; ``keep`` is bool ``[B, text_len]``, False for padding."""
        mask = self.whole_mask()
        return None if mask is None else with_text_mask(mask, self.layout, keep)

    def whole_mask(self) -> BlockMask | Tensor | None:
        """The mask, which must be in one part.

        Raises:
            TypeError: text is attended apart, because the plan was not built for padded text.
        """
        if isinstance(self.mask, TextApart):
            raise TypeError("this plan was not built for padded text: its text queries are attended apart")
        return self.mask

    def tensors(self) -> list[Tensor]:
        """Every tensor that the plan holds."""
        found = [self.rows, self.columns]
        if self.pooling is not None:
            found += [self.pooling.members, self.pooling.share]
        found += [t for t in (self.order, self.inverse) if t is not None]
        if self.mask is None:
            return found
        if isinstance(self.mask, Tensor):
            return [*found, self.mask]
        lists = self.mask.image if isinstance(self.mask, TextApart) else self.mask
        found += [t for t in lists.as_tuple(flatten=True) if isinstance(t, Tensor)]
        return found + captured_tensors(lists.mask_mod)


@independent
def build_plan(
    layout: Layout,
    window: Window | None,
    backend: str,
    kernel: Kernel,
    device: torch.device,
    backward: bool,
    text_padded: bool = False,
) -> Plan:
    """Build a plan; see ``Plan``. ``window`` None is dense attention, ``backend`` is ``"flex"`` or ``"sdpa"``, ``kernel``
    says how FlexAttention is built. For the other arguments see ``block_mask``.

    Raises:
        ValueError: the dense mask of masked SDPA would be larger than ``MAX_DENSE_BYTES``.

    Warns:
        UserWarning: part of the image does not see a reference image, or the window covers more frames than the clip has.
    """
    mask: Mask
    if window is not None:
        warn_of_unreached(layout, window)
        warn_of_depth(layout, window)
    if window is None:
        every = torch.ones(1, layout.seq_len, dtype=torch.bool, device=device)
        mask = of_any_text_length(every) if text_padded else None
    elif backend == "flex":
        size, source = kernel.block_size, kernel.coordinates
        if kernel.text_apart and not backward and not text_padded and can_part(layout, window):
            mask = text_apart(layout, window, block_size=size, device=device, coordinates=source)
            with_kernel(mask.image, kernel)
        else:
            lists = block_mask(
                layout,
                window,
                block_size=size,
                device=device,
                backward=backward,
                text_padded=text_padded,
                coordinates=source,
                narrow=not backward and device.type != "cpu",
            )
            mask = of_any_text_length(with_kernel(lists, kernel))
    elif layout.seq_len**2 > MAX_DENSE_BYTES:
        raise ValueError(
            f"masked SDPA over {layout.seq_len} tokens ({layout.height} x {layout.width} image tokens and "
            f"{layout.text_len} of text) needs a dense mask of {layout.seq_len**2 / 2**30:.1f} GiB, more than "
            f"{MAX_DENSE_BYTES / 2**30:.0f} GiB. Compiled FlexAttention needs no dense mask: backend='flex', on CUDA, or on CPU "
            f"under torch.no_grad() with a C++ compiler. With masked SDPA {_largest_side(layout.text_len)} x "
            f"{_largest_side(layout.text_len)} image tokens fit"
        )
    else:
        mask = of_any_text_length(dense_mask(layout, window, device=device))
    raster = layout.order == "raster" and not (layout.is_packed and mask is not None)
    _, y, x = layout.coordinates()
    return Plan(
        layout=layout,
        mask=mask,
        order=None if raster else layout.permutation().to(device),
        inverse=None if raster else layout.inverse_permutation().to(device),
        rows=y.to(device, torch.float32),
        columns=x.to(device, torch.float32),
        pooling=make_pooling(layout, window.factor, device) if isinstance(window, Downsampled) else None,
    )


def _largest_side(text_len: int) -> int:
    """Side in tokens of the largest square image whose dense mask is allowed."""
    return math.isqrt(max(math.isqrt(MAX_DENSE_BYTES) - text_len, 0))


def _size_of(plan: Plan) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in plan.tensors())


plans: ByteBoundedCache[Plan] = ByteBoundedCache(max_bytes=1 << 30, size_of=_size_of)
"""This process's plans, keyed by everything that determines them (never by model). See ``plans.stats()`` and
``plans.clear()``."""


def get_plan(
    layout: Layout,
    window: Window | None,
    backend: str,
    kernel: Kernel,
    device: torch.device,
    backward: bool = False,
    text_padded: bool = False,
) -> Plan:
    """The cached plan for these arguments, built if necessary; see ``build_plan``."""
    key = (layout, window, backend, kernel, device, backward, text_padded)
    return plans.get(key, lambda: build_plan(*key))
