"""What ranks tell each other beside their transfers, through the store of the process group: who is there, and who has
stopped, and why.

The groups that ranks make together are a generation, and the runs within it are numbered. A rank that stops leaves a note,
which ends the generation. A run that one rank does not finish fails once on every rank, so the next run is the same one for
all of them.
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
"""How long the store may take to answer, which it does in less than a millisecond."""


@dataclass(frozen=True)
class Note:
    """What a rank leaves behind.

    Attributes:
        rank: its place in the group.
        run: the run that it was in, from 1 in each generation.
        where: how far it was, for messages.
        early: its run ended, without an error, before the last step.
        error: what stopped it; empty where another rank did, which it could not tell yet.
    """

    rank: int
    run: int
    where: str
    early: bool = False
    error: str = ""


class StoreGoneError(ParallelError):
    """The store of the process group does not answer."""


class Notes:
    """The notes of one group of ranks, and where this rank is.

    Args:
        store: of the default process group, under a prefix of the group's own.
        ranks: global ranks.
        rank: this process's place in ``ranks``.

    Attributes:
        generation, run: where this rank is; generation 0 is before the first one.
        where: how far it is, for messages: ``step 3``.
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
        """The notes of this generation, the first one first."""
        found = []
        for number in range(1, self._ask("add", f"{self.generation}/notes", 0) + 1):
            key = f"{self.generation}/note/{number}"
            if self._ask("check", [key]):  # it is counted before it is there
                found.append(Note(**json.loads(self._ask("get", key))))
        return found

    def arrive(self, seconds: float, watch: Callable[[], None]) -> list[int]:
        """Wait until every rank is in this generation.

        Args:
            seconds: how long to wait.
            watch: called meanwhile; an exception ends the waiting.

        Returns:
            Those that are not, in the end.
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
        """This rank and how far it is, in words."""
        return f"rank {self.ranks[self.rank]}, {self.where}"

    def _arrived(self, rank: int) -> str:
        return f"{self.generation}/here/{rank}"

    def _connection(self) -> Any:
        # One of its own: a process group that is being made keeps the store's while it waits for the others.
        if not self._connected:
            self._connected = True
            with contextlib.suppress(AttributeError, NotImplementedError):  # of torch before 2.8, of some stores
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
    """The process that the store of the default process group is in."""
    return "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
