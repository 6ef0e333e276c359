"""Installed versions, and differences between versions, without importing anything."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

VERSION = "0.1.0"
"""Version of flexclear."""


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions(names: Iterable[str] = ("torch", "diffusers", "transformers", "torchao")) -> dict[str, str]:
    """Versions of flexclear, of Python, and of those named distributions that are installed."""
    found = {name: installed(name) for name in names}
    return {
        "flexclear": VERSION,
        "python": platform.python_version(),
        **{name: value for name, value in found.items() if value is not None},
    }


def release(text: str | None) -> tuple[int, int]:
    """(major, minor) of a version such as ``"0.42.1"``; (0, 0) if there is none."""
    match = re.match(r"(\d+)\.(\d+)", text or "")
    return (0, 0) if match is None else (int(match[1]), int(match[2]))


def dtype_option() -> str:
    """Name of the argument of diffusers' ``from_pretrained`` that takes the data type.

    It is ``dtype`` from diffusers 0.40 on, where ``torch_dtype`` is deprecated; earlier releases know only ``torch_dtype``
    and ignore the other with a warning.
    """
    return "dtype" if release(installed("diffusers")) >= (0, 40) else "torch_dtype"
