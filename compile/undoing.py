"""Putting back what is changed for a while, whatever is raised in between, and on the way back as well."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def undo(action: Callable[[], None]) -> None:
    """Run what puts something back, and where it is interrupted run it again: ``action`` may be run twice, but not half."""
    try:
        action()
    except BaseException:
        action()
        raise


@contextlib.contextmanager
def afterwards(action: Callable[[], None]) -> Iterator[None]:
    """Run ``action`` at the end of a ``with`` block, and where it is interrupted run it again, as ``undo`` does."""
    done = False
    try:
        try:
            yield
        finally:
            action()
            done = True
    except BaseException:
        if not done:
            action()
        raise


@contextlib.contextmanager
def numbers_as_before(parameters: Iterable[Tensor]) -> Iterator[None]:
    """The numbers in ``parameters`` are after a ``with`` block what they were before it."""
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def put_back() -> None:
        for parameter, numbers in kept:
            parameter.copy_(numbers)

    with afterwards(put_back):
        yield
