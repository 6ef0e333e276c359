"""Extra attributes that travel on a BlockMask, and on its copies."""

from __future__ import annotations

from typing import Any

LENGTHS = "symbolic_lengths"
"""Attribute that holds an empty tensor ``[queries, keys, 0]``, sized as the mask is (``flexclear.masks.lengths``)."""

KERNEL_OPTIONS = "kernel_options"
"""Attribute that holds a tuple of (name, value) pairs, the options of its kernels (``flexclear.compile.kernels``)."""


def carry(source: Any, target: Any) -> Any:
    """Copy what ``source`` carries to ``target``, and return ``target``."""
    for name in (LENGTHS, KERNEL_OPTIONS):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
    return target
