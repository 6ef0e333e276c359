"""Checks run on a node. The functions are sent by value, since the package may be missing there."""

from __future__ import annotations

from typing import Any


def needs_token() -> bool | None:
    """Whether Ray requires a token with calls to this process; None if it cannot be determined."""
    import importlib

    try:
        raylet: Any = importlib.import_module("ray._raylet")
        return bool(raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN)
    except (ImportError, AttributeError):
        return None


def examine(job: bytes, folder: str, wanted: dict[str, str], token: bool | None) -> list[str]:
    """Reasons why this node cannot do a job; empty if there are none.

    Args:
        job: the pickled job.
        folder: the working directory, from which relative paths are resolved.
        wanted: versions of the process that owns the job.
        token: ``needs_token`` of that process.
    """
    import pickle
    import sys

    if token and needs_token() is False:
        return [
            "Ray uses no token there but uses one here, so all actors would be lost: set RAY_AUTH_MODE=disabled here, or restart "
            "the cluster with the token"
        ]

    try:
        from flexclear.common.versions import versions

        found = versions()
    except ImportError as error:
        return [f"flexclear cannot be imported by {sys.executable}: {error}"]
    names: Any = {**wanted, **found}
    unequal = [
        f"{name} {found.get(name, 'missing')}, here {wanted.get(name, 'missing')}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]
    if unequal:
        return unequal
    try:
        from flexclear.cluster.worker import enter

        enter(folder)
        asked = pickle.loads(job)
        files = asked.look()
    except (OSError, ValueError, TypeError, ImportError) as error:
        return [str(error)]
    return [] if files == asked.files else ["files of the job have the same names there as here, but other contents"]
