"""Extra attributes carried by a BlockMask and its copies."""

from __future__ import annotations

from typing import Any

LENGTHS = "symbolic_lengths"
"""Attribute that holds an empty tensor ``[queries, keys, 0]`` of the mask's size (``flexclear.masks.lengths``)."""

KERNEL_OPTIONS = "kernel_options"
"""Attribute that holds the kernel options as a tuple of (name, value) pairs (``flexclear.compile.kernels``)."""


def carry(source: Any, target: Any) -> Any:
    """Copy the extra attributes of ``source`` to ``target``, and return ``target``."""
    for name in (LENGTHS, KERNEL_OPTIONS):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
    return target
