"""A least-recently-used cache that is bounded by bytes and safe from several threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from flexclear.masks.checks import check_int

Value = TypeVar("Value")


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was made or cleared.

    Attributes:
        hits, misses: look-ups that found their value, and look-ups that built it.
        evictions: values dropped to make room.
        entries, bytes: what is held now.
        max_bytes: the bound.
    """

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int
    max_bytes: int


class ByteBoundedCache(Generic[Value]):
    """Values by hashable key; the least recently used are dropped first when ``max_bytes`` is exceeded.

    A single value larger than the bound is kept until the next one arrives: otherwise a huge image would rebuild
    its mask in every step.

    Args:
        max_bytes: bound in bytes, 1 or more.
        size_of: bytes that a value holds.
    """

    def __init__(self, max_bytes: int, size_of: Callable[[Value], int]) -> None:
        self.max_bytes = check_int("max_bytes", max_bytes, 1)
        self._size_of = size_of
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._hits = self._misses = self._evictions = self._bytes = 0

    def get(self, key: Hashable, build: Callable[[], Value]) -> Value:
        """The value of ``key``, built by ``build()`` if it is not there.

        ``build`` runs outside the lock; if two threads build the same key, both get the value that was stored first.
        """
        with self._lock:
            if key in self._values:
                self._hits += 1
                self._values.move_to_end(key)
                return self._values[key][0]
            self._misses += 1
        value = build()
        size = self._size_of(value)
        with self._lock:
            if key not in self._values:
                self._values[key] = (value, size)
                self._bytes += size
                while self._bytes > self.max_bytes and len(self._values) > 1:
                    _, (_, freed) = self._values.popitem(last=False)
                    self._bytes -= freed
                    self._evictions += 1
            return self._values[key][0]

    def stats(self) -> CacheStats:
        """Hits, misses, evictions, and the entries and bytes now held."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, len(self._values), self._bytes, self.max_bytes)

    def clear(self) -> None:
        """Drop every value and set the counts to zero."""
        with self._lock:
            self._values.clear()
            self._hits = self._misses = self._evictions = self._bytes = 0
