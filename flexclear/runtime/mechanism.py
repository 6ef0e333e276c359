"""The interface of an alternative to CLEAR's window, as ``transform`` uses it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from flexclear.masks import Layout, Window

if TYPE_CHECKING:
    from flexclear.runtime.plan import Plan

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""``(query, key, value, weight) -> out``, each ``[B, heads, N, head_dim]`` in sequence order, after norms and RoPE."""


class Mechanism(ABC):
    """Another attention mechanism. Implementations are frozen dataclasses whose fields are its sizes in tokens."""

    kind: ClassVar[str]
    """The name that ``transform(attention=...)`` takes."""

    source: ClassVar[str]
    """Where it was published."""

    @property
    def name(self) -> str:
        """Short label that includes the sizes."""
        return self.kind

    @abstractmethod
    def flops(self, layout: Layout, channels: int, heads: int, layer: int = 0) -> int:
        """Attention FLOPs of one layer for one sample; ``layer`` is its number, in case layers differ."""


class WindowMechanism(Mechanism):
    """An alternative that is a mask: a window per layer, run by the same kernels as CLEAR's.

    Construction fails unless the sizes are valid for the windows of both even and odd layers.
    """

    def __post_init__(self) -> None:
        for layer in (0, 1):
            self.window(layer)

    @property
    def name(self) -> str:
        return self.window(0).name

    @abstractmethod
    def window(self, layer: int) -> Window:
        """The window of attention layer number ``layer``, counted from 0 in the order of the forward pass."""

    def flops(self, layout: Layout, channels: int, heads: int, layer: int = 0) -> int:
        from flexclear.masks import cost

        return cost(layout, self.window(layer), channels=channels).flops


class Formula(Mechanism):
    """An alternative with its own formula instead of softmax over a mask."""

    @abstractmethod
    def bind(self, plan: Plan) -> Attend:
        """The formula bound to the plan's sequence: its grid, token order and device.

        Raises:
            ValueError: it is not defined over this layout; the message says which layouts it supports.
        """

    def weight_shape(self, channels: int) -> tuple[int, ...] | None:
        """Shape of the parameter that each layer gets (``compression_weight``), or None if it gets none."""
        return None

    def initial_weight(self) -> float:
        """That parameter's initial value."""
        return 0.0


def one_grid(layout: Layout, what: str) -> None:
    """Raise if reference images are part of the sequence.

    Raises:
        ValueError: they are.
    """
    if layout.references:
        raise ValueError(
            f"{what} is defined for one grid, and this layout has {len(layout.grids)}: {layout.grids}. Leave the "
            "reference images out, or use attention='sigmoid', 'linear' or 'clear'"
        )
