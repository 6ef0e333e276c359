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
    """Another way to attend; implementations are frozen dataclasses whose fields are its sizes in tokens."""

    kind: ClassVar[str]
    """The name that ``transform(attention=...)`` takes."""

    source: ClassVar[str]
    """Where it was published."""

    @property
    def name(self) -> str:
        """Short label, sizes included."""
        return self.kind

    @abstractmethod
    def flops(self, layout: Layout, channels: int, heads: int, layer: int = 0) -> int:
        """Attention FLOPs of one layer and one sample; ``layer`` is its number, where layers differ."""


class WindowMechanism(Mechanism):
    """An alternative that is a mask: a window per layer, run by the same kernels as CLEAR's.

    Made only with sizes that its windows of even and odd layers take.
    """

    def __post_init__(self) -> None:
        for layer in (0, 1):
            self.window(layer)

    @property
    def name(self) -> str:
        return self.window(0).name

    @abstractmethod
    def window(self, layer: int) -> Window:
        """The window of the attention layer of that number, counted from 0 in the order of the forward pass."""

    def flops(self, layout: Layout, channels: int, heads: int, layer: int = 0) -> int:
        from flexclear.masks import cost

        return cost(layout, self.window(layer), channels=channels).flops


class Formula(Mechanism):
    """An alternative with its own formula instead of softmax over a mask."""

    @abstractmethod
    def bind(self, plan: Plan) -> Attend:
        """The formula over the plan's sequence: its grid, its token order, its device.

        Raises:
            ValueError: it is not defined over this layout; the message says which layouts it is defined over.
        """

    def weight_shape(self, channels: int) -> tuple[int, ...] | None:
        """Shape of the parameter that each layer gets (``compression_weight``), or None: it gets none."""
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
