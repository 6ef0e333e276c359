"""Undoing temporary changes, whatever is raised in the meantime, even while they are being undone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def undo(action: Callable[[], None]) -> None:
    """Run ``action``, which undoes something, and run it again if interrupted: it may run twice, but never only in part."""
    try:
        action()
    except BaseException:
        action()
        raise


@contextlib.contextmanager
def afterwards(action: Callable[[], None]) -> Iterator[None]:
    """Run ``action`` at the end of a ``with`` block, and again if interrupted, as ``undo`` does."""
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
    """Restore the values of ``parameters`` after a ``with`` block."""
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def put_back() -> None:
        for parameter, numbers in kept:
            parameter.copy_(numbers)

    with afterwards(put_back):
        yield
