"""Attention of a band as one operator, which is opaque to compiled blocks."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flexclear.parallel.session import Session

_sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def ticket_of(session: Session) -> Tensor:
    """A number for a session, as a 0-d tensor: a Python number would be compiled in."""
    number = next(_numbers)
    _sessions[number] = session
    return torch.tensor(number, dtype=torch.int64, device="cpu")


@torch.library.custom_op("flexclear::band_attend", mutates_args=())
def band_attend(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, ticket: Tensor, slot: int, scale: float | None
) -> Tensor:
    """``BandCall.attend`` of a session's current call."""
    call = _sessions[int(ticket)].current
    if call is None:
        raise RuntimeError("a compiled block of a shared model was called without the model's entry")
    return call.attend(call.masks[slot], slot, query, key, value, weight, scale)


@band_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, ticket: Tensor, slot: int, scale: float | None
) -> Tensor:
    return value.new_empty((*query.shape[:3], value.shape[3]))
