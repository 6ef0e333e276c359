"""The alternatives that are masks: a window per layer.

Their published settings give every image query 256 image keys at 1024 px, in addition to all text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexclear.masks import Neighborhood, Strided, Swin, Window
from flexclear.runtime.mechanism import WindowMechanism


@dataclass(frozen=True)
class StridedAttention(WindowMechanism):
    """An image query sees the keys of its own phase on a grid of that stride (``flexclear.masks.Strided``).

    Args:
        stride: in tokens; published: 4, so 16 x 16 keys at 1024 px.
    """

    kind: ClassVar[str] = "strided"
    source: ClassVar[str] = "Child et al. 2019, Generating Long Sequences with Sparse Transformers, arXiv 1904.10509"
    stride: int = 4

    def window(self, layer: int) -> Window:
        return Strided(self.stride)


@dataclass(frozen=True)
class SwinAttention(WindowMechanism):
    """An image query sees its own square of a partition, which is shifted by half a square in every other layer
    (``flexclear.masks.Swin``).

    Layers are counted from 0 through the whole model; odd ones are shifted. A square that is cut off by the border stays
    separate, as with Swin's cyclic shift and mask.

    Args:
        size: side in tokens; published: 16.
    """

    kind: ClassVar[str] = "swin"
    source: ClassVar[str] = "Liu et al. 2021, Swin Transformer, arXiv 2103.14030"
    size: int = 16

    @property
    def name(self) -> str:
        return f"swin_w{self.size}"

    def window(self, layer: int) -> Window:
        plain = Swin(self.size)
        return plain if layer % 2 == 0 else Swin(self.size, self.size // 2)


@dataclass(frozen=True)
class NeighborhoodAttention(WindowMechanism):
    """An image query sees a square around it that is shifted inwards at the border (``flexclear.masks.Neighborhood``).

    Args:
        kernel: side in tokens. The paper names no setting (the mechanism is only in its Table 1); 16 gives as many keys as the
            others have.
    """

    kind: ClassVar[str] = "neighborhood"
    source: ClassVar[str] = "Hassani et al. 2023, Neighborhood Attention Transformer, arXiv 2204.07143"
    kernel: int = 16

    def window(self, layer: int) -> Window:
        return Neighborhood(self.kernel)
