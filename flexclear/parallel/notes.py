"""Messages that ranks exchange through the process group's store, in addition to tensor transfers: which ranks are present, and
which have stopped and why.

The process groups that ranks create together form a generation, whose runs are numbered. A rank that stops leaves a note, which
ends the generation. A run that one rank does not finish fails once on every rank, so that all ranks agree on the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexclear.parallel.errors import ParallelError
from flexclear.parallel.waiting import POLL, wait_for

STORE_SECONDS = 60.0
"""How long the store may take to answer; normally it takes less than a millisecond."""


@dataclass(frozen=True)
class Note:
    """The note of a rank that has stopped, or has ended a run early.

    Attributes:
        rank: the rank's place in the group.
        run: number of its run, from 1 in each generation.
        where: how far it had come, for messages.
        early: whether its run ended before the last step without an error.
        error: what stopped it; empty if another rank did, and the reason was not known yet.
    """

    rank: int
    run: int
    where: str
    early: bool = False
    error: str = ""


class StoreGoneError(ParallelError):
    """The store of the process group does not answer."""


class Notes:
    """The notes of one group of ranks, and the progress of this rank.

    Args:
        store: store of the default process group, with a prefix for this group.
        ranks: global ranks.
        rank: this process's place in ``ranks``.

    Attributes:
        generation, run: this rank's current generation and run; generation 0 is before the first one.
        where: how far it has come, for messages, such as ``step 3``.
    """

    def __init__(self, store: Any, ranks: Sequence[int], rank: int) -> None:
        self._store = store
        self._connected = False
        self.ranks = tuple(ranks)
        self.rank = rank
        self.generation = 0
        self.run = 0
        self.where = "set-up"
        self._gone: Exception | None = None

    def advance(self) -> None:
        """Go to the first run of the next generation."""
        self.generation += 1
        self.run = 1

    def leave(self, error: str = "", early: bool = False) -> None:
        """Leave a note."""
        note = Note(self.rank, self.run, self.where, early, error)
        number = self._ask("add", f"{self.generation}/notes", 1)
        self._ask("set", f"{self.generation}/note/{number}", json.dumps(asdict(note)))

    def read(self) -> list[Note]:
        """The notes of this generation, oldest first."""
        found = []
        for number in range(1, self._ask("add", f"{self.generation}/notes", 0) + 1):
            key = f"{self.generation}/note/{number}"
            if self._ask("check", [key]):  # a note is counted before it is written
                found.append(Note(**json.loads(self._ask("get", key))))
        return found

    def arrive(self, seconds: float, watch: Callable[[], None]) -> list[int]:
        """Wait until every rank is in this generation.

        Args:
            seconds: how long to wait.
            watch: called while waiting; an exception ends the wait.

        Returns:
            The ranks that did not arrive.
        """
        self._ask("set", self._arrived(self.rank), "")
        end = time.monotonic() + seconds
        pause = 0.001
        while not self._ask("check", [self._arrived(rank) for rank in range(len(self.ranks))]):
            watch()
            if time.monotonic() > end:
                return [rank for rank in range(len(self.ranks)) if not self._ask("check", [self._arrived(rank)])]
            time.sleep(pause)
            pause = min(2 * pause, POLL)
        return []

    def names(self, ranks: Sequence[int]) -> str:
        """Ranks in words."""
        return " and ".join(f"rank {self.ranks[rank]}" for rank in ranks)

    @property
    def here(self) -> str:
        """This rank and how far it has come, in words."""
        return f"rank {self.ranks[self.rank]}, {self.where}"

    def _arrived(self, rank: int) -> str:
        return f"{self.generation}/here/{rank}"

    def _connection(self) -> Any:
        # A separate connection: a process group under construction blocks the store's while it waits for the other ranks.
        if not self._connected:
            self._connected = True
            with contextlib.suppress(AttributeError, NotImplementedError):  # in torch before 2.8; in some stores
                self._store = self._store.clone()
        return self._store

    def _ask(self, name: str, *args: Any) -> Any:
        """
        Raises:
            StoreGoneError: the store does not answer, or has not answered before.
        """
        if not self._gone:
            try:
                return wait_for(lambda: getattr(self._connection(), name)(*args), STORE_SECONDS)
            except (RuntimeError, TimeoutError) as error:
                self._gone = error
        raise StoreGoneError(
            f"{self.here}: no answer from the store of the process group: {_holder()}, which holds it, is gone or halted. "
            "Start all ranks again"
        ) from self._gone


def _holder() -> str:
    """The process that holds the store of the default process group."""
    return "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
