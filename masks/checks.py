"""Checks of plain arguments, shared so that all messages read alike."""

from __future__ import annotations


def check_int(name: str, value: object, least: int, most: int | None = None, unit: str = "") -> int:
    """Return ``value`` if it is an int in ``[least, most]``; a bool is not an int here.

    Raises:
        TypeError: not an int.
        ValueError: out of range.
    """
    wanted = f"an int >= {least}" if most is None else f"an int from {least} to {most}"
    wanted += f" {unit}" if unit else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__})")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return value
