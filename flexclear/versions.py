"""Which versions are installed, without importing anything."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions(names: Iterable[str] = ("torch", "diffusers", "transformers", "torchao")) -> dict[str, str]:
    """Versions of flexclear, Python and those of the named distributions that are installed."""
    import flexclear

    found = {name: installed(name) for name in names}
    return {
        "flexclear": flexclear.__version__,
        "python": platform.python_version(),
        **{name: value for name, value in found.items() if value is not None},
    }
