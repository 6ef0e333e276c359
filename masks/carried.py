"""What travels on a BlockMask besides what torch keeps there: copies of a mask have it too."""

from __future__ import annotations

from typing import Any

LENGTHS = "symbolic_lengths"
"""Attribute under which an empty tensor ``[queries, keys, 0]`` says how long the mask is (``flexclear.masks.lengths``)."""

KERNEL_OPTIONS = "kernel_options"
"""Attribute under which a tuple of (name, value) says how its kernels are built (``flexclear.compile.kernels``)."""


def carry(source: Any, target: Any) -> Any:
    """Give ``target`` what ``source`` carries, and return it."""
    for name in (LENGTHS, KERNEL_OPTIONS):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
    return target
