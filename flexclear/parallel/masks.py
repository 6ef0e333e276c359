"""The masks of one rank: its image queries over its own keys, all text, its neighbours' borders and pooled keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexclear.compile.kernels import Kernel, with_kernel
from flexclear.masks import Downsampled, Layout, Window
from flexclear.masks.blocks import block_mask_between
from flexclear.masks.cache import ByteBoundedCache
from flexclear.masks.coordinates import int_number
from flexclear.masks.defaults import independent
from flexclear.masks.padding import with_text_mask_at
from flexclear.masks.places import POOLED, TEXT
from flexclear.parallel.planning import Bands, Part, gathered_order, line_sizes, packed_raster, part_of, sides
from flexclear.runtime.plan import MAX_DENSE_BYTES, Plan
from flexclear.runtime.pooling import Pooling


@dataclass(frozen=True, eq=False)
class BandPlan(Plan):
    """``Plan`` of one rank: ``order``, ``rows`` and ``columns`` describe its own image tokens, ``mask`` their attention.

    The mask's queries are the rank's image tokens. Its keys are those, then text, then keys from other ranks, then pooled keys.
    Text queries have no mask: they see every token.

    Attributes:
        part: what the rank has and exchanges.
        gathered: place of each raster token in the concatenation of all ranks' tokens, int64 ``[image_len]``.
        sizes: number of image tokens of every rank.
        cell_numbers: pooled cells of every rank, one rank after the other, int64; empty without pooled keys.
    """

    part: Part = None  # type: ignore[assignment]
    gathered: Tensor = None  # type: ignore[assignment]
    sizes: tuple[int, ...] = ()
    sends: dict[int, Tensor] = None  # type: ignore[assignment]
    cell_numbers: tuple[Tensor, ...] = ()

    def masked(self, keep: Tensor) -> BlockMask | Tensor | None:
        """The mask without the text keys that are padding; ``keep`` is bool ``[B, text_len]``."""
        mask = self.whole_mask()
        return None if mask is None else with_text_mask_at(mask, len(self.part.own), keep)

    def tensors(self) -> list[Tensor]:
        """Every tensor that the plan holds."""
        return [
            *super().tensors(),
            self.gathered,
            self.part.own,
            self.part.halo,
            *self.sends.values(),
            *self.cell_numbers,
        ]


def key_tokens(part: Part) -> Tensor:
    """Packed coordinates of a rank's keys, in the order of the keys: int32."""
    packed = packed_raster(part.layout)
    rows, columns = (0, 0) if part.window is None else part.window.pooled_grid(part.layout)
    return torch.cat(
        [
            packed[part.own],
            packed.new_full((part.layout.text_len,), TEXT),
            packed[part.halo],
            packed.new_full((rows * columns,), POOLED),
        ]
    )


@independent
def dense_band_mask(part: Part, device: torch.device | str = "cpu") -> Tensor:
    """Which of a rank's keys its image queries may see, bool ``[own, keys]``, computed from coordinates.

    Raises:
        ValueError: it would be larger than ``flexclear.runtime.plan.MAX_DENSE_BYTES``.
    """
    assert part.window is not None
    keys = key_tokens(part)
    if len(part.own) * len(keys) > MAX_DENSE_BYTES:
        raise ValueError(
            f"masked SDPA over {len(part.own)} queries and {len(keys)} keys of rank {part.rank} needs a dense mask of "
            f"{len(part.own) * len(keys) / 2**30:.1f} GiB, more than {MAX_DENSE_BYTES / 2**30:.0f} GiB. Compiled "
            "FlexAttention needs none: backend='flex', on CUDA, or on CPU with a C++ compiler. Or use more ranks"
        )
    keys = keys.to(device)
    inside = part.window.rule(part.layout, int_number(device))
    unpack = part.layout.packing.unpack
    return inside(unpack(keys[: len(part.own), None]), unpack(keys[None, :])) | (keys[None, :] < 0)


@independent
def build_band_plan(
    layout: Layout,
    window: Window | None,
    bands: Bands,
    rank: int,
    backend: str,
    kernel: Kernel,
    device: torch.device,
    text_padded: bool = False,
) -> BandPlan:
    """Build a rank's plan. ``bands`` says where the image is cut; other arguments as in ``flexclear.runtime.plan.build_plan``.

    Raises:
        ValueError: the dense mask of masked SDPA would be too large.
    """
    part = part_of(layout, window, bands, rank)
    keys = key_tokens(part)
    mask: BlockMask | Tensor | None
    if window is None:
        mask = torch.ones(1, len(keys), dtype=torch.bool, device=device) if text_padded else None
    elif len(part.own) == 0:
        mask = None
    elif backend == "flex":
        lists = block_mask_between(
            layout,
            window,
            len(part.own),
            keys,
            block_size=kernel.block_size,
            device=device,
            text_padded=text_padded,
            coordinates=kernel.coordinates,
        )
        mask = with_kernel(lists, kernel)
    else:
        mask = dense_band_mask(part, device)
    _, rows, columns = layout.packing.unpack(packed_raster(layout)[part.own])
    pooling = None
    if part.cells:
        cells = part.cells[rank]
        pooling = Pooling(cells.members.flatten().to(device), cells.share.to(device), False, len(part.own))
    every = [part_of_size(layout, bands, other) for other in range(bands.ranks)]
    return BandPlan(
        layout=layout,
        mask=mask,
        order=part.own.to(device),
        inverse=None,
        rows=rows.to(device, torch.float32),
        columns=columns.to(device, torch.float32),
        pooling=pooling,
        part=part,
        gathered=gathered_order(layout, bands).to(device),
        sizes=tuple(every),
        sends={other: places.to(device) for other, places in part.sends.items()},
        cell_numbers=tuple(cells.numbers.to(device) for cells in part.cells),
    )


def part_of_size(layout: Layout, bands: Bands, rank: int) -> int:
    """Number of image tokens of a rank."""
    first, stop = bands.run(rank)
    lines = zip(sides(layout, bands.axis), line_sizes(layout, bands.axis), strict=True)
    return sum(max(min(stop, side) - first, 0) * size for side, size in lines)


def _size_of(plan: BandPlan) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in plan.tensors())


band_plans: ByteBoundedCache[BandPlan] = ByteBoundedCache(max_bytes=1 << 30, size_of=_size_of)
"""Plans of this process's bands, keyed by everything that determines them."""


def get_band_plan(*facts: object) -> BandPlan:
    """The cached plan for these positional arguments of ``build_band_plan``, built if necessary."""
    return band_plans.get(facts, lambda: build_band_plan(*facts))  # type: ignore[arg-type]


__all__ = ["BandPlan", "Downsampled", "band_plans", "build_band_plan", "dense_band_mask", "get_band_plan", "key_tokens"]
