"""The actors of a job: placed, loaded, given calls, and replaced when they are lost."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flexclear.cluster.connection import Cluster, first_line
from flexclear.cluster.job import Job
from flexclear.cluster.queue import Call, Queue
from flexclear.cluster.worker import Worker
from flexclear.images.folder_settings import differences

LOSSES = 5
"""How often one call may lose its actor, or actors may be lost in a row without a successful call, before the job ends."""

PLACING_SECONDS = 10
"""Seconds that a job waits for room for all its actors before it begins with those that have some."""

PLACING, LOADING, IDLE, WORKING = "placing", "loading", "idle", "working"


@dataclass(eq=False)
class _Member:
    actor: Any
    stage: str = PLACING
    label: str = "an actor"


@contextlib.contextmanager
def crew_for(
    job: Job, cluster: Cluster, actors: int | None, calls: int, say: Callable[[str], None]
) -> Iterator[tuple[Crew, dict[str, Any]]]:
    """Yield actors of a cluster that have loaded a job, and what all of them report; stop them afterwards.

    Args:
        job: the job.
        cluster: the cluster.
        actors: number of actors; None: see ``Cluster.actors``.
        calls: maximum number of calls; more actors than calls would be useless.
        say: called with messages for the user.

    Raises:
        OSError, TypeError, ValueError: a node or actor cannot do this.
        RuntimeError: actors are lost over and over.
    """
    cluster.check(job)
    crew = Crew(cluster, job, min(cluster.actors(actors), calls), say)
    try:
        yield crew, crew.start()
    finally:
        crew.close()


class Crew:
    """Actors with at most one call each. If an actor is lost, another one does its call, and nothing is accepted from an actor
    that was given up. So no call is lost, and none counts twice.

    Ray's own retries are off. They would repeat a call for as long as it kills its actor, and hold back the calls of a lost
    node until another one joins.

    Args:
        cluster: the cluster.
        job: the job.
        actors: number of actors.
        say: called with messages for the user.
    """

    def __init__(self, cluster: Cluster, job: Job, actors: int, say: Callable[[str], None]) -> None:
        self._cluster, self._job, self._say = cluster, job, say
        self._ray = cluster.ray
        # SPREAD: across nodes as far as there is room.
        self._kind = self._ray.remote(
            max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD", **cluster.resources(actors)
        )(Worker)
        self._job_ref = self._ray.put(job)
        self._count = actors
        self._asked: dict[Any, _Member] = {}  # by the pending answer
        self._members: list[_Member] = []
        self._queue = Queue(())
        self._losses: Counter[str] = Counter()
        self._in_a_row = 0
        self._told: dict[str, Any] | None = None
        self._begun = self._waited = False
        self._why = ""

    def start(self) -> dict[str, Any]:
        """Place the actors and have them load; return what all of them report about their work.

        Raises:
            OSError, TypeError, ValueError: an actor cannot do this, or not in the same way as another.
            RuntimeError: actors are lost over and over, or any other failure in one.
        """
        for _ in range(self._count):
            self._add()
        begin = time.monotonic()
        while True:
            for _ in self._turn():
                pass
            stages = Counter(member.stage for member in self._members)
            patient = time.monotonic() - begin < PLACING_SECONDS
            if stages[IDLE] and not stages[LOADING] and not (stages[PLACING] and patient):
                break
            if not patient:
                self._say_if_waiting()
        if stages[PLACING]:
            self._say(
                f"{stages[PLACING]} of {self._count} actors wait for room in the cluster; work begins without them"
            )
        self._begun = True
        assert self._told is not None
        return self._told

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Any]]:
        """Do all calls; yield each with its result, in the order in which they finish.

        Raises:
            Exception: whatever a call raised.
            RuntimeError: a call has lost its actor ``LOSSES`` times, or any other failure in an actor.
        """
        self._queue = Queue(calls)
        while self._queue.unfinished:
            for member in self._members:
                call = self._queue.take(member) if member.stage == IDLE else None
                if call is not None:
                    member.stage = WORKING
                    self._asked[member.actor.run.remote(call.payload)] = member
            self._say_if_waiting()
            yield from self._turn()

    def close(self) -> None:
        """End the actors."""
        for member in self._members:
            self._ray.kill(member.actor)
        self._members, self._asked = [], {}

    def _add(self) -> None:
        member = _Member(self._kind.remote(os.getcwd()))
        self._members.append(member)
        self._asked[member.actor.place.remote()] = member

    def _turn(self) -> Iterator[tuple[Call, Any]]:
        """Wait a while for an answer; yield the result of a call."""
        from ray.exceptions import RayError, RayTaskError

        ready, _ = self._ray.wait(list(self._asked), num_returns=1, timeout=1)
        for answer in ready:
            member = self._asked.pop(answer)
            try:
                found = self._ray.get(answer)
            except RayTaskError as error:
                self._failed(member, error)
            except RayError as error:
                self._lost(member, error)
            else:
                if member.stage == PLACING:
                    member.label, member.stage = self._cluster.label(found), LOADING
                    self._asked[member.actor.prepare.remote(self._job_ref)] = member
                elif member.stage == LOADING:
                    self._loaded(member, *found)
                else:
                    member.stage = IDLE
                    self._in_a_row = 0
                    yield self._queue.finished(member), found

    def _loaded(self, member: _Member, told: dict[str, Any], remarks: list[str]) -> None:
        if self._told is None:
            self._told = told
            for line in remarks:
                self._say(line)
        elif told != self._told:
            text = f"{member.label} would draw differently from the first: {'; '.join(differences(self._told, told))}"
            self._leave_out(member, ValueError(text))
            return
        member.stage = IDLE

    def _failed(self, member: _Member, error: Any) -> None:
        """A worker has raised an exception."""
        cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
        text = f"{member.label}: {cause if str(cause) else type(cause).__name__}"
        kinds = (FileNotFoundError, OSError, ImportError, TypeError, ValueError)
        kind = next((kind for kind in kinds if isinstance(cause, kind)), None)
        failure = RuntimeError(f"{text} ({type(cause).__name__})") if kind is None else kind(text)
        failure.__cause__ = error
        if member.stage == WORKING:
            raise failure
        self._leave_out(member, failure)

    def _leave_out(self, member: _Member, failure: Exception) -> None:
        """An actor cannot do the job. Before work has begun, that is an error; later, the others continue without it."""
        self._drop(member)
        if not self._begun or not self._members:
            raise failure
        self._say(f"{failure}; it is left out")

    def _lost(self, member: _Member, error: Exception) -> None:
        """A worker is gone, with its process or its node."""
        call = self._queue.lost(member)
        self._drop(member)
        self._why = f"{member.label} was lost: {first_line(error)}"
        self._in_a_row += 1
        if call is not None:
            self._losses[call.name] += 1
            if self._losses[call.name] >= LOSSES:
                raise RuntimeError(f"{call.name} has lost its actor {LOSSES} times and is given up; {self._why}")
        if self._in_a_row >= LOSSES * self._count:
            raise RuntimeError(f"{self._in_a_row} actors were lost one after the other; {self._why}")
        self._say(self._why + ("" if call is None else f"; {call.name} is done by another actor"))
        self._add()

    def _drop(self, member: _Member) -> None:
        self._members.remove(member)
        self._ray.kill(member.actor)

    def _say_if_waiting(self) -> None:
        nobody = all(member.stage == PLACING for member in self._members)
        if nobody and not self._waited:
            self._say("no actor has room in the cluster now; waiting for it")
        self._waited = nobody
