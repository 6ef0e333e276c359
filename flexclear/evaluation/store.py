"""Results for images, kept on disk with checksums, so that an evaluation resumes where it was stopped."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

AT_ONCE = 500


class Store:
    """float32 arrays by key, in one SQLite file, or in memory if there is no path.

    >>> store = Store()
    >>> store.put({"a": np.array([1.0, 2.0])})
    >>> store.get(["a", "b"])
    {'a': array([1., 2.], dtype=float32)}
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open or create the store.

        Raises:
            OSError: the file cannot be opened or written, for example on a full disk, or another process keeps it locked.
            ValueError: the file exists but is not a store, or is damaged.
        """
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            self._connection = sqlite3.connect(":memory:" if path is None else str(path), timeout=60)
            with self._connection:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS checked (key TEXT PRIMARY KEY, value BLOB, checksum BLOB)"
                )

    def get(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
        """Return the arrays of the known keys.

        Raises:
            OSError, ValueError: see ``Store``.
        """
        wanted, found = list(dict.fromkeys(keys)), {}
        for start in range(0, len(wanted), AT_ONCE):
            part = wanted[start : start + AT_ONCE]
            query = f"SELECT key, value, checksum FROM checked WHERE key IN ({','.join('?' * len(part))})"
            with self._errors():
                rows = self._connection.execute(query, part).fetchall()
            for key, value, checksum in rows:
                if not isinstance(value, bytes) or checksum != _checksum(key, value):
                    raise ValueError(self._damaged(f"the checksum of {key} is another"))
                found[key] = np.frombuffer(value, dtype=np.float32)
        return found

    def put(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Store arrays. They are on disk when this returns.

        Raises:
            OSError, ValueError: see ``Store``.
        """
        values = {key: np.ascontiguousarray(value, dtype=np.float32).tobytes() for key, value in arrays.items()}
        rows = [(key, value, _checksum(key, value)) for key, value in values.items()]
        with self._errors(), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO checked VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, full, read-only, no such folder
            number = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
            raise OSError(number, f"what is computed so far cannot be used: {error}", str(self._path)) from error
        except sqlite3.DatabaseError as error:
            raise ValueError(self._damaged(error)) from error

    def _damaged(self, error: object) -> str:
        return f"{self._path} is damaged or holds no results of an evaluation: {error}. Delete it to compute all again"


def _checksum(key: str, value: bytes) -> bytes:
    return hashlib.blake2b(key.encode() + value, digest_size=8).digest()


def fingerprint(*parts: str) -> str:
    """A short name for some texts. Different texts have different names."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]
