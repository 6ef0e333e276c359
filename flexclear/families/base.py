"""What ``transform`` asks of a model family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from flexclear.plan import Plan


@dataclass(frozen=True)
class Call:
    """One call of a model as the entry hook sees it, read before any work.

    Attributes:
        height, width: image grid in tokens.
        text_len: text tokens.
        tokens: the image tokens, ``[B, height * width, C]``, for their device and type.
    """

    height: int
    width: int
    text_len: int
    tokens: Tensor


class Family(Protocol):
    """Where tokens enter and leave, where the grid comes from, which attention modules count, where text sits.

    Implementations hold no state: all that varies travels in the arguments of the model's call.
    """

    model_class: str
    """Name of the diffusers class."""

    text_first: bool
    """Whether text precedes the image in the attention's sequence."""

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` is of this family."""
        ...

    def attention_modules(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        """Name and module of each attention layer whose processor is to be replaced.

        Raises:
            ValueError: the model lacks the blocks of its class.
            TypeError: an attention layer has a processor that the family cannot replace.
        """
        ...

    def processor(self) -> Any:
        """A new windowed processor."""
        ...

    def read(self, kwargs: dict[str, Any], grid: Any) -> Call:
        """The facts of one call. ``grid`` reads height and width off position ids.

        Raises:
            ValueError: the call cannot be windowed; the message names what was given.
        """
        ...

    def enter(self, kwargs: dict[str, Any], plan: Plan, exact_ids: bool) -> dict[str, Any]:
        """The call's arguments in the plan's token order, the plan among them."""
        ...

    def plan_of(self, kwargs: dict[str, Any]) -> Plan:
        """The plan that ``enter`` put into the arguments."""
        ...

    def leave(self, output: Any, plan: Plan) -> Any:
        """The model's output back in raster order."""
        ...
