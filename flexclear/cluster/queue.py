"""Calls that wait for a worker, grouped by what masks and graphs depend on, so that workers can reuse theirs."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """What a worker does at a time.

    Attributes:
        name: for messages.
        key: what masks and graphs depend on; calls with equal keys share them.
        cost: cost relative to other calls.
        payload: input for the worker.
    """

    name: str
    key: Hashable
    cost: float
    payload: Any


class Queue:
    """Decides who does what next. Workers are any hashable objects.

    A worker keeps its key while calls with that key remain. Then it takes a key that nobody works on, the one with the most
    work first. Only then does it help others, unless each of them has at most one call left: they have already compiled, while
    it would have to compile first.
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
        """Number of calls that are waiting or running."""
        return sum(map(len, self._waiting.values())) + len(self._busy)

    def take(self, worker: Hashable) -> Call | None:
        """The next call for an idle worker; None if there is nothing for it now. Ask again later."""
        key = self._choose(worker)
        if key is None:
            return None
        call = self._waiting[key[0]].popleft()
        if not self._waiting[key[0]]:
            del self._waiting[key[0]]
        self._busy[worker], self._last[worker] = call, call.key
        return call

    def finished(self, worker: Hashable) -> Call:
        """Record that a worker has done its call; return the call."""
        call = self._busy.pop(worker)
        self._warm[worker].add(call.key)
        return call

    def lost(self, worker: Hashable) -> Call | None:
        """Record that a worker is lost. Its call, which is returned, waits again as the next one with its key."""
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
