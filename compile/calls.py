"""Prepare a call of a compiled module for Dynamo: sizes that change with the number of text tokens become symbols."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from flexclear.masks.lengths import mark_symbolic

Size = tuple[int, ...]

CARRIED = "flexclear_plan"
"""Attribute of a tensor that carries a plan, and its key in a dictionary."""


class WithText(Protocol):
    """Knows the lengths of a call, as the plan of a transformed model does, which travels with a block's arguments."""

    @property
    def image_len(self) -> int:
        """Number of image tokens."""

    @property
    def seq_len(self) -> int:
        """Number of tokens, text and image."""

    def sequence_tensors(self) -> Iterable[Tensor]:
        """Tensors of its own with one row per token, text and image."""


def carried_by(values: Iterable[Any]) -> Any:
    """The plan that one of these arguments carries, or None."""
    for value in values:
        if isinstance(value, Tensor):
            found = getattr(value, CARRIED, None)
        elif isinstance(value, dict):
            found = value.get(CARRIED)
        else:
            found = carried_by(value) if isinstance(value, tuple | list) else None
        if found is not None:
            return found
    return None


class Given:
    """The arguments of one call of a module. Every call of every block makes one, so nothing is looked up twice.

    Attributes:
        args, kwargs: as they were passed, or made ``dense``.
        named: all of them by name.
        first: ``hidden_states`` or, if nothing has that name, the first one; None if that is not a tensor.
        text: ``encoder_hidden_states`` if those are tokens ``[B, tokens, C]``, else None.
        plan: the plan that one of them carries, or None.
    """

    __slots__ = ("args", "first", "kwargs", "named", "plan", "text")

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dense: bool = False
    ) -> None:
        """``dense``: bring tokens into one layout of memory.

        Blocks pass on views of what attention returned, whose stride between samples spans text and image together. Dynamo
        would compile that stride in, and the first block of a stack would need a different graph from the rest. A dense view
        costs nothing to bring into shape; in a batch of several samples it is copied.
        """
        if dense:
            args = tuple([_dense(value) for value in args])
            kwargs = {name: _dense(value) for name, value in kwargs.items()}
        self.args, self.kwargs = args, kwargs
        kind: Any = type(module)
        self.named = named = {**dict(zip(_names(kind), args, strict=False)), **kwargs}
        first = named["hidden_states"] if "hidden_states" in named else next(iter(named.values()), None)
        self.first = first if isinstance(first, Tensor) else next(_tensors(first), None)
        text = named.get("encoder_hidden_states")
        self.text = text if isinstance(text, Tensor) and text.ndim == 3 else None
        self.plan: WithText | None = carried_by(named.values())

    @property
    def size(self) -> Size | None:
        """The size that the call is compiled for, whatever its text: numbers of samples and image tokens; None if text and
        image cannot be told apart."""
        first = self.first
        if first is None:
            return None
        if self.plan is not None:
            return first.shape[0], self.plan.image_len
        if isinstance(self.named.get("encoder_hidden_states"), Tensor) or first.ndim > 3:
            return tuple(first.shape)[: 2 if first.ndim == 3 else None]
        return None

    def mark(self, plan: WithText | None = None) -> None:
        """Mark every size that changes with the number of text tokens.

        The plan of a transformed model (``plan``, or the one that is carried) says what that is. Otherwise
        ``encoder_hidden_states`` are taken for the text, and a module without them is assumed to get text and image in its
        first argument. What belongs to the image is never marked, even where there are as many text tokens: Dynamo recompiles
        for a mark that a graph was made without.
        """
        first, text, plan = self.first, self.text, self.plan if plan is None else plan
        image_len = 0
        if plan is not None:
            image_len, seq_len = plan.image_len, plan.seq_len
            for tensor in plan.sequence_tensors():
                _mark(tensor, (seq_len,))
        elif first is None or first.ndim != 3:
            seq_len = 0
        elif text is not None:
            image_len, seq_len = first.shape[1], first.shape[1] + text.shape[1]
        else:
            seq_len = first.shape[1]
        lengths: tuple[int, ...] = (seq_len,)
        image = None
        if text is not None:
            image, text_len = first, text.shape[1]
            if text_len > 1:
                mark_symbolic(text, (1,))
            if text_len != image_len:
                lengths = (seq_len, text_len)
        batch = 0 if first is None else len(first)
        for name, value in self.named.items():
            if value is None or value is text or value is image:
                continue
            mask = "mask" in name
            for tensor in (value,) if isinstance(value, Tensor) else _tensors(value):
                conditions = tensor.ndim == 2 and not mask and len(tensor) == batch  # one row per sample
                if not (conditions or tensor is text or tensor is image):
                    _mark(tensor, lengths, mask)


def _mark(tensor: Tensor, lengths: tuple[int, ...], mask: bool = False) -> None:
    """Mark the axes that are as long: of tables ``[tokens, C]`` and tokens ``[B, tokens, ...]``, of masks ``[B, tokens]``."""
    shape = tensor.shape
    rank = len(shape)
    axes = range(1, rank) if mask else range(rank - 1) if rank == 2 else range(1, rank - 1)
    dims = [dim for dim in axes if shape[dim] in lengths and shape[dim] > 1]
    if dims:
        mark_symbolic(tensor, dims)


@functools.cache
def _names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _dense(value: Any) -> Any:
    """Tokens ``[B, N, C]`` in the memory layout of a new tensor; anything else unchanged."""
    if not isinstance(value, Tensor) or value.ndim != 3:
        return value
    expected = (value.shape[1] * value.shape[2], value.shape[2], 1)
    if value.stride() == expected:
        return value
    # In a batch of one, torch ignores the stride between samples and calls it contiguous, but Dynamo compares the stride.
    return value.view(-1).view(value.shape) if value.is_contiguous() else value.contiguous()
