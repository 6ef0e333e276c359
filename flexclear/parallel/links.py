"""Ranks meet before each step, and so learn whether one of them is late, has stopped or is in another run.

A rank that stops closes its process groups, which wakes the others. Its note says why it stopped (``flexclear.parallel.notes``).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from flexclear.parallel.errors import ParallelError
from flexclear.parallel.notes import Note, StoreGoneError
from flexclear.parallel.transfers import GRACE, Pending, TransferError, Transfers
from flexclear.parallel.waiting import POLL, wait_for


class Links(Transfers):
    """The connections between the ranks of one group, run by run."""

    def __init__(self, ranks: Sequence[int], timeout: float, name: str) -> None:
        super().__init__(ranks, timeout, name)
        self._running = False
        self._met = False
        self._ended_early = (0, 0)
        self._left = ""

    @property
    def _place(self) -> tuple[int, int]:
        return self.notes.generation, self.notes.run

    @property
    def _is_early(self) -> bool:
        return self._ended_early == self._place

    # One run: its beginning, its meetings, its end

    def start(self, where: str, resume: bool = False) -> None:
        """Begin a run, or another part of it. Nothing is sent.

        Args:
            where: progress of this rank, for messages.
            resume: whether this part belongs to the previous run, so that a rank that stops in that run must stop this one too.
        """
        begun = self._running and not self._met
        if not begun:
            self._running = True
            self._left = self.notes.where
            if not self._groups:
                self.notes.advance()
            elif not resume:
                self.notes.run += 1
            self._met = resume and bool(self._groups)
        self.notes.where = where

    def meet(self, message: Any) -> tuple[list[Any], bool]:
        """Meet the other ranks. Afterwards all ranks are in the same run.

        Args:
            message: message to the others, a JSON value.

        Returns:
            The messages of all ranks, in the order of ranks, and whether the connections were made again, which loses pending
            transfers.

        Raises:
            ParallelError: another rank has stopped, is late, or is missing.
        """
        anew = False
        while True:
            try:
                if not self._groups:
                    self._open()
                    anew = True
                self._watch()
                said = self._tell([self.notes.run, self._is_early, self._left, message])
                if len({(run, early) for run, early, *_ in said}) == 1:
                    self._met = True
                    return [text for *_, text in said], anew
                self._catch_up(said)
            except _OverError:
                self._close_groups()
                self.notes.advance()

    def end(self, early: bool = False) -> None:
        """End a run without an error.

        Args:
            early: whether it had steps left, in which other ranks may be waiting for this one.
        """
        if early and self._running:
            # The run is over here, whatever has happened to the store.
            with contextlib.suppress(StoreGoneError):
                self.notes.leave(early=True)
            self._ended_early = self._place
        self._running = False

    def fail(self, error: BaseException | None) -> None:
        """Close all connections, tell the others, and raise if they are the cause. Does nothing outside of a run.

        Args:
            error: what stopped this rank. None, or an error of a transfer, means that another rank is the cause or is missing.

        Raises:
            ParallelError: another rank is the cause.
        """
        if not self._running:
            return
        self._running = False
        own = error is not None and not isinstance(error, ParallelError | dist.DistError)
        try:
            self.notes.leave(_in_words(error) if own else "")
        except StoreGoneError:
            if not own:
                raise
        finally:
            self._close_groups()
        if not own:
            raise self._diagnosis(error) from error

    def close(self) -> None:
        """Release all resources."""
        self._running = False
        self._close_groups()

    def _open(self) -> None:
        if self.size > 1:
            missing = self.notes.arrive(self.timeout, self._watch)
            if missing:
                self._fail_with(self._late(missing))
            self._watch()
        self._open_groups()

    def _watch(self) -> None:
        """Look for notes of the other ranks.

        Raises:
            ParallelError: one has stopped in this run, or ended it early.
            _OverError: one has stopped in the previous run, which had ended here.
        """
        others = [note for note in self.notes.read() if note.rank != self.rank]
        stopped = [note for note in others if not note.early]
        if stopped and not self._met and all(note.run < self.notes.run for note in stopped):
            raise _OverError
        if stopped:
            self.fail(None)
        early = [note for note in others if note.run == self.notes.run]
        if early and self._met and not self._is_early:
            self._fail_with(self._ended([note.rank for note in early], early[0].where))

    def _catch_up(self, said: Sequence[tuple[int, bool, str, Any]]) -> NoReturn:
        """Handle ranks that are in different runs, or have ended one: ranks behind stop, and ranks ahead wait for that.

        Raises:
            ParallelError: this rank is behind; or ranks behind have stopped, or fail to stop in time.
            _OverError: they have stopped in a run that had ended here.
        """
        places = [(run, early) for run, early, *_ in said]
        first = [rank for rank in range(self.size) if places[rank] == max(places)]
        if self.rank not in first:
            another = "" if max(places)[0] == self.notes.run else ", and had begun another one"
            self._fail_with(self._ended(first, said[first[0]][2]) + another)
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            self._watch()
            time.sleep(POLL)
        self._fail_with(self._late([rank for rank in range(self.size) if rank not in first]))

    # Who is the cause

    def _late(self, ranks: Sequence[int]) -> str:
        return (
            f"{self.notes.names(ranks)} did not answer within {self.timeout:g} s: gone, or late. A run needs all ranks; "
            "flexclear.parallel.enable(timeout=...) says how long to wait"
        )

    def _ended(self, ranks: Sequence[int], where: str) -> str:
        return f"{self.notes.names(ranks)} had ended this run after {where}"

    def _fail_with(self, message: str) -> NoReturn:
        """Stop because of other ranks, with a known message."""
        self._running = False
        try:
            self.notes.leave(message)
        finally:
            self._close_groups()
        raise ParallelError(f"{self.notes.here}: {message}")

    def _others(self) -> list[Note]:
        """The notes of the other ranks, once any gives a reason or all have left one, or after ``GRACE`` seconds.

        Raises:
            StoreGoneError: the store is gone, and the rank that holds it has not said that it stopped.
        """
        end = time.monotonic() + GRACE
        notes: list[Note] = []
        while True:
            try:
                notes = [note for note in self.notes.read() if note.rank != self.rank]
            except StoreGoneError:
                # Rank 0 may leave a note, stop, and take the store with it.
                if all(self.ranks[note.rank] != 0 for note in notes):
                    raise
                end = 0.0
            notes = [note for note in notes if not note.early or note.run == self.notes.run]
            silent = set(range(self.size)) - {self.rank, *(note.rank for note in notes)}
            if not silent or any(note.error or note.early for note in notes) or time.monotonic() > end:
                return notes
            time.sleep(0.05)

    def _diagnosis(self, error: BaseException | None) -> ParallelError:
        here, notes = self.notes.here, self._others()
        silent = set(range(self.size)) - {self.rank, *(note.rank for note in notes)}
        causes = {note.rank: note for note in notes if note.error} or {note.rank: note for note in notes if note.early}
        if causes:
            told = (f"rank {self.ranks[note.rank]} {_how_it_ended(note)}" for note in causes.values())
            return ParallelError(f"{here}: {'; '.join(told)}")
        if silent and isinstance(error, TransferError) and not error.late:
            return ParallelError(
                f"{here}: {self.notes.names(sorted(silent))} closed the connection without a reason: gone. A run needs all "
                "ranks"
            )
        if silent:
            return ParallelError(f"{here}: {self._late(sorted(silent))}")
        told = (f"rank {self.ranks[note.rank]} in {note.where}" for note in notes)
        why = "" if error is None else f" ({error})"
        return ParallelError(
            f"{here}: {' and '.join(told)} stopped waiting: this rank was late, or the connection between them is broken{why}"
        )

    def _lost(self, error: TransferError) -> NoReturn:
        if not self._met:
            self._watch()
        self.fail(error)
        raise error

    def _tell(self, message: Any) -> list[Any]:
        """Exchange messages (JSON values) and return them in the order of ranks. Watches for notes of others in the meantime."""
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        others = [rank for rank in range(self.size) if rank != self.rank]
        length = torch.tensor([len(data)])
        lengths = self._heard(
            self.exchange(dict.fromkeys(others, length), dict.fromkeys(others, (1,)), length, "control")
        )
        shapes = {rank: (int(lengths[rank]),) for rank in others}
        found = self._heard(self.exchange(dict.fromkeys(others, data), shapes, data, "control"))
        found[self.rank] = data
        return [json.loads(bytes(found[rank].numpy())) for rank in range(self.size)]

    def _heard(self, pending: Pending) -> dict[int, Tensor]:
        end = time.monotonic() + self.timeout

        def wait() -> None:
            for work in pending.works:
                work.wait(timedelta(seconds=max(0.001, end - time.monotonic())))

        if pending.works:
            with self._transfer():
                wait_for(wait, self.timeout + GRACE, self._watch)
        return pending.received


class _OverError(Exception):
    """Another rank has stopped in the previous run, which had ended here."""


def _in_words(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _how_it_ended(note: Note) -> str:
    return f"had ended this run after {note.where}" if note.early else f"stopped in {note.where}: {note.error}"
