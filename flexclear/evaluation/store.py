"""What was computed of pictures, kept on disk, so that an evaluation goes on where it was stopped."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

AT_ONCE = 500


class Store:
    """Arrays of float32 by key, in one SQLite file; in memory without a path.

    >>> store = Store()
    >>> store.put({"a": np.array([1.0, 2.0])})
    >>> store.get(["a", "b"])
    {'a': array([1., 2.], dtype=float32)}
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open the store, or make it.

        Raises:
            ValueError: the file is there and is no store.
        """
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(":memory:" if path is None else str(path), timeout=60)
        try:
            with self._connection:
                self._connection.execute("CREATE TABLE IF NOT EXISTS arrays (key TEXT PRIMARY KEY, value BLOB)")
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is there, and holds no results of an evaluation: {error}") from error

    def get(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
        """The arrays of those keys that are known."""
        wanted, found = list(dict.fromkeys(keys)), {}
        for start in range(0, len(wanted), AT_ONCE):
            part = wanted[start : start + AT_ONCE]
            marks = ",".join("?" * len(part))
            for key, value in self._connection.execute(f"SELECT key, value FROM arrays WHERE key IN ({marks})", part):
                found[key] = np.frombuffer(value, dtype=np.float32)
        return found

    def put(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep them; they are on disk when this returns."""
        rows = [(key, np.ascontiguousarray(value, dtype=np.float32).tobytes()) for key, value in arrays.items()]
        with self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO arrays VALUES (?, ?)", rows)

    def close(self) -> None:
        self._connection.close()


def fingerprint(*parts: str) -> str:
    """A short name of some texts; other texts, other names."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]
