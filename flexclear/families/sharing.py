"""Hooks inside a model that makes its tokens itself: they put tokens in order, and share them among several ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flexclear.compile.calls import carried_by
from flexclear.runtime.carrying import Hook, carrying


class OrderHook(Hook):
    """Forward pre-hook of the first block: puts image tokens, which have their positions by now, into the plan's order.

    Blocks are called with keyword arguments, but under gradient checkpointing with positional ones, the image first.
    """

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        plan = carried_by((*args, *kwargs.values()))
        if plan is None:
            return args, kwargs  # the block was called alone: its attention raises
        if args:
            return (plan.to_image_order(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": plan.to_image_order(kwargs["hidden_states"])}


class RowsHook(Hook):
    """Forward hook of the module that makes the rotary embedding: selects the rows of this rank's tokens.

    Attributes:
        dim: axis with a row for each token.
    """

    after = True

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        plan = carried_by((output,))
        if plan is None:
            return output
        return carrying(tree_map(lambda rows: plan.to_image_order(rows, self.dim), output), plan)


class GatherHook(Hook):
    """Forward hook of the last layer before patches become an image: gathers the tokens of all ranks in raster order."""

    after = True

    def __init__(self, current: Any) -> None:
        self.current = current

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        call = self.current()
        return output if call is None else call.gather(output)
