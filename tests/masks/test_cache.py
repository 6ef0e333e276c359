"""The cache: least recently used goes first, bytes are bounded, threads do not disturb it."""

from __future__ import annotations

import threading

import pytest

from flexclear.masks.cache import ByteBoundedCache


def test_the_least_recently_used_value_goes_first():
    cache = ByteBoundedCache(max_bytes=20, size_of=len)
    built = []

    def get(key):
        return cache.get(key, lambda: built.append(key) or key * 10)

    get("a"), get("b"), get("a"), get("c")
    assert built == ["a", "b", "c"]
    get("a")
    assert built == ["a", "b", "c"]
    get("b")
    assert built == ["a", "b", "c", "b"]
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.evictions, stats.entries, stats.bytes) == (2, 4, 2, 2, 20)


def test_a_value_larger_than_the_bound_stays_until_the_next_one():
    cache = ByteBoundedCache(max_bytes=5, size_of=len)
    first = cache.get("big", lambda: "x" * 50)
    assert cache.get("big", lambda: "y") is first
    cache.get("small", lambda: "z")
    assert cache.stats().entries == 1
    assert cache.stats().bytes == 1


def test_clear_forgets_values_and_counts():
    cache = ByteBoundedCache(max_bytes=5, size_of=len)
    cache.get("a", lambda: "1")
    cache.clear()
    assert cache.stats() == ByteBoundedCache(max_bytes=5, size_of=len).stats()


def test_threads_that_build_one_key_at_once_get_one_value():
    cache = ByteBoundedCache(max_bytes=1000, size_of=lambda value: 1)
    barrier, found = threading.Barrier(8), []

    def work():
        barrier.wait()
        for key in range(50):
            found.append((key, id(cache.get(key, object))))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 50
    assert cache.stats().bytes == 50


def test_a_build_that_fails_leaves_nothing_behind():
    cache = ByteBoundedCache(max_bytes=5, size_of=len)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 // 0)
    assert cache.stats().entries == 0


def test_a_bound_below_one_byte_is_named():
    with pytest.raises(ValueError, match="max_bytes must be an int >= 1, got 0"):
        ByteBoundedCache(max_bytes=0, size_of=len)
