"""Replaces attention in the layers of a transformed model inside a ``with`` block."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from flexclear.compile.undoing import afterwards

Attend = Callable[..., Tensor]
"""Takes a layer's name and processor, then the arguments of ``WindowProcessor.attend``; returns the same as that."""


@contextlib.contextmanager
def attending(processors: Mapping[str, Any], attend: Attend) -> Iterator[None]:
    """Inside the block, ``attend`` replaces the ``attend`` of these processors, given by layer name.

    Raises:
        ValueError: another block already replaces it in one of the layers.
    """
    taken = [name for name, processor in processors.items() if "attend" in vars(processor)]
    if taken:
        raise ValueError(
            f"{taken[0]} is inside another block of flexclear.analysis (observe or clipped_distances); end that one first"
        )

    def put_back() -> None:
        for processor in processors.values():
            vars(processor).pop("attend", None)

    with afterwards(put_back):
        for name, processor in processors.items():
            processor.attend = functools.partial(attend, name, processor)
        yield
