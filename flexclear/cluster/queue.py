"""Calls that wait for a worker, by what masks and graphs depend on: a worker stays with the sizes that it has them for."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """What a worker does at once.

    Attributes:
        name: for people.
        key: what masks and graphs depend on: of equal ones they are shared.
        cost: relative to that of other calls.
        payload: for the worker.
    """

    name: str
    key: Hashable
    cost: float
    payload: Any


class Queue:
    """Who does what next. Workers are any hashable objects.

    A worker keeps its key while calls with that key remain. Then it takes a key that nobody works on, the one with the most work
    first. Only then does it help others, and not where each of them has at most one call left: they have compiled already, and it
    would have to compile first.
    """

    def __init__(self, calls: Iterable[Call]) -> None:
        self._waiting: dict[Hashable, deque[Call]] = {}
        for call in calls:
            self._waiting.setdefault(call.key, deque()).append(call)
        self._busy: dict[Hashable, Call] = {}
        self._last: dict[Hashable, Hashable] = {}
        self._warm: dict[Hashable, set[Hashable]] = defaultdict(set)

    @property
    def unfinished(self) -> int:
        """Calls that wait or are being done."""
        return sum(map(len, self._waiting.values())) + len(self._busy)

    def take(self, worker: Hashable) -> Call | None:
        """The next call of an idle worker; None where there is nothing for it now. Later there may be: ask again."""
        key = self._choose(worker)
        if key is None:
            return None
        call = self._waiting[key[0]].popleft()
        if not self._waiting[key[0]]:
            del self._waiting[key[0]]
        self._busy[worker], self._last[worker] = call, call.key
        return call

    def finished(self, worker: Hashable) -> Call:
        """A worker has done its call, which it returns."""
        call = self._busy.pop(worker)
        self._warm[worker].add(call.key)
        return call

    def lost(self, worker: Hashable) -> Call | None:
        """A worker is gone; its call, which it returns, waits again and is the next of its key."""
        self._warm.pop(worker, None)
        self._last.pop(worker, None)
        call = self._busy.pop(worker, None)
        if call is not None:
            self._waiting.setdefault(call.key, deque()).appendleft(call)
        return call

    def _choose(self, worker: Hashable) -> tuple[Hashable] | None:
        last = self._last.get(worker)
        if worker in self._last and last in self._waiting:
            return (last,)
        warm = self._warm.get(worker, set())
        at: dict[Hashable, list[Hashable]] = defaultdict(list)
        for other, call in self._busy.items():
            at[call.key].append(other)
        alone = [key for key in self._waiting if not at[key]]
        helped = [key for key in self._waiting if key in warm or self._worth_joining(key, at[key])]
        keys = alone or helped
        if not keys:
            return None
        return (max(keys, key=lambda key: (key in warm, self._work(key) / (len(at[key]) + 1))),)

    def _worth_joining(self, key: Hashable, others: list[Hashable]) -> bool:
        ready = any(key in self._warm.get(other, ()) for other in others)
        return not ready or len(self._waiting[key]) > len(others)

    def _work(self, key: Hashable) -> float:
        return sum(call.cost for call in self._waiting[key])
