"""Prepare a call of a compiled module for Dynamo: sizes that change with the number of text tokens become symbols."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from flexclear.masks.lengths import mark_symbolic

Size = tuple[int, ...]


class WithText(Protocol):
    """Knows the lengths of a call, like the plan of a transformed model, which is passed along with a block's arguments."""

    @property
    def image_len(self) -> int:
        """Number of image tokens."""

    @property
    def seq_len(self) -> int:
        """Number of tokens, text and image."""

    def sequence_tensors(self) -> Iterable[Tensor]:
        """Its own tensors that have one row per token, text and image."""


def ready(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one call of a block, with text lengths marked and tokens in a uniform memory layout.

    Blocks pass on views of the attention output, whose stride between samples spans text and image together. Dynamo would
    compile that stride in, and the first block of a stack would need a different graph from the rest. For one sample the
    dense layout costs nothing; in a batch of several samples the view is copied.
    """
    plan = _plan((*args, *kwargs.values()))
    args, kwargs = tuple(map(_dense, args)), {name: _dense(value) for name, value in kwargs.items()}
    mark(module, args, kwargs, plan)
    return args, kwargs


def mark(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], plan: WithText | None = None) -> None:
    """Mark the sizes in the arguments of a call that change with the number of text tokens.

    The plan of a transformed model determines them. Otherwise ``encoder_hidden_states`` are taken for the text, and a module
    without them is assumed to get text and image in its first argument. Sizes of the image are never marked, even if there are
    equally many text tokens: Dynamo recompiles for a mark that a graph was made without.
    """
    named = _named(module, args, kwargs)
    first, text = _first(named), named.get("encoder_hidden_states")
    text = text if isinstance(text, Tensor) and text.ndim == 3 else None
    if plan is not None:
        image_len, seq_len = plan.image_len, plan.seq_len
        for tensor in plan.sequence_tensors():
            _mark(tensor, {seq_len})
    elif first is None or first.ndim != 3:
        image_len = seq_len = 0
    elif text is not None:
        image_len, seq_len = first.shape[1], first.shape[1] + text.shape[1]
    else:
        image_len, seq_len = 0, first.shape[1]
    lengths, batch = {seq_len}, 0 if first is None else len(first)
    if text is not None:
        if text.shape[1] > 1:
            mark_symbolic(text, [1])
        if text.shape[1] != image_len:
            lengths.add(text.shape[1])
    for name, value in named.items():
        for tensor in _tensors([value]):
            mask, image = "mask" in name, text is not None and tensor is first
            conditions = tensor.ndim == 2 and len(tensor) == batch and not mask  # one row per sample
            if not (tensor is text or image or conditions):
                _mark(tensor, lengths, mask)


def _mark(tensor: Tensor, lengths: set[int], mask: bool = False) -> None:
    """Mark token axes of these lengths: in tables ``[tokens, C]``, tokens ``[B, tokens, ...]`` and masks ``[B, tokens]``."""
    axes = range(1, tensor.ndim) if mask else range(tensor.ndim - 1) if tensor.ndim == 2 else range(1, tensor.ndim - 1)
    dims = [dim for dim in axes if tensor.shape[dim] in lengths and tensor.shape[dim] > 1]
    if dims:
        mark_symbolic(tensor, dims)


def size_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Size | None:
    """The size that a call is compiled for, regardless of its text: numbers of samples and image tokens. None if text and image
    cannot be told apart."""
    named = _named(module, args, kwargs)
    first, plan = _first(named), _plan(named.values())
    if first is None:
        return None
    if plan is not None:
        return first.shape[0], plan.image_len
    if isinstance(named.get("encoder_hidden_states"), Tensor) or first.ndim > 3:
        return tuple(first.shape)[: 2 if first.ndim == 3 else None]
    return None


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    kind: Any = type(module)
    return {**dict(zip(_names(kind), args, strict=False)), **kwargs}


@functools.cache
def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _first(named: Mapping[str, Any]) -> Tensor | None:
    return next(_tensors([named.get("hidden_states", next(iter(named.values()), None))]), None)


def _plan(values: Iterable[Any]) -> WithText | None:
    """The plan among the arguments: an entry of a dictionary, or carried by a tensor."""
    for value in values:
        holders = [value] if isinstance(value, dict) else map(vars, _tensors([value]))
        for candidate in (each for holder in holders for each in holder.values()):
            if hasattr(type(candidate), "sequence_tensors"):
                return candidate
    return None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _dense(value: Any) -> Any:
    """Tokens ``[B, N, C]`` in the memory layout of a new tensor; anything else unchanged."""
    if not isinstance(value, Tensor) or value.ndim != 3:
        return value
    expected = (value.shape[1] * value.shape[2], value.shape[2], 1)
    if value.stride() == expected:
        return value
    # In a batch of one, torch ignores the stride between samples and calls it contiguous, but Dynamo compares the stride.
    return value.view(-1).view(value.shape) if value.is_contiguous() else value.contiguous()
