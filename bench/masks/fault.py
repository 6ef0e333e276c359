"""What a planted fault is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One edit.

    Attributes:
        name: short label.
        file: path from the root of the project.
        old, new: what is replaced by what.
        effect: what is wrong then.
    """

    name: str
    file: str
    old: str
    new: str
    effect: str
