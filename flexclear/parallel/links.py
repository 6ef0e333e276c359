"""The one place where ranks talk: sends, sums, gathers, a check that all are there, and the count of bytes.

Process groups are made here, by rank and store, and not through ``torch.distributed.new_group``: they can then be thrown
away after an error and made anew under another name, which is what lets a second run in the same processes work. Each
rank also writes into the store when it stops, and why; who has not written is who is missing.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flexclear.parallel.errors import ParallelError

GRACE = 5.0
"""Seconds that a rank has to say why it stopped, after another has noticed."""


@dataclass
class Pending:
    """Transfers that are under way.

    Attributes:
        received: what comes from each source, complete after ``wait``.
        works: handles by rank.
        sent: kept alive until it has gone.
    """

    links: Links
    received: dict[int, Tensor] = field(default_factory=dict)
    works: list[tuple[int, Any]] = field(default_factory=list)
    sent: list[Tensor] = field(default_factory=list)

    def wait(self) -> dict[int, Tensor]:
        """Wait for all of it.

        Raises:
            ParallelError: a rank is late or gone.
        """
        for rank, work in self.works:
            self.links.wait(work, rank)
        self.works, self.sent = [], []
        return self.received


class Links:
    """The ways between the ranks of one group.

    Args:
        ranks: global ranks, in the order of the bands.
        timeout: seconds after which a rank counts as late.
        name: tells the groups of one process apart; the same on all ranks.

    Attributes:
        rank: this process's place in ``ranks``.
        sent: bytes that this rank has sent, by kind, as payload: of sends what is sent, of a sum or a gather what this
            rank puts in.
        where: what is being done, for messages: ``step 3``.
    """

    def __init__(self, ranks: Sequence[int], timeout: float, name: str) -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.timeout = timeout
        self.sent: Counter[str] = Counter()
        self.where = "set-up"
        members = "-".join(map(str, self.ranks))  # several groups of one world have a store in common
        self._store = dist.PrefixStore(f"flexclear/{name}/{members}", _get_default_store())
        self._generation = 0
        self._groups: dict[str, Any] = {}
        self._closed = True
        self._tag = 0

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    # Opening, closing, saying why

    def open(self, resume: bool) -> bool:
        """Make sure that there are ways.

        Args:
            resume: whether a run is going on, so that another rank's stop must stop this one too.

        Returns:
            Whether they were made anew, so that what was under way is lost.

        Raises:
            ParallelError: another rank has stopped, or is not there.
        """
        if not self._closed and self._stopped():
            if resume:
                self.fail(None)
            self._close()
        if not self._closed:
            return False
        self._generation += 1
        self._groups = {}
        self._closed = False
        self._tag = 0
        self._group(torch.device("cpu"), "control")
        return True

    def _key(self, rank: int) -> str:
        return f"{self._generation}/stopped/{rank}"

    def _stopped(self) -> dict[int, dict[str, Any]]:
        """Ranks that have said that they stopped, and what they said."""
        found = {}
        for rank in range(self.size):
            if self._store.check([self._key(rank)]):
                found[rank] = json.loads(self._store.get(self._key(rank)))
        return found

    def fail(self, error: BaseException | None) -> None:
        """Close all ways, say so to the others, and raise if they are the cause.

        Args:
            error: what stopped this rank; None, or an error of a transfer: another rank is the cause, or missing.

        Raises:
            ParallelError: another rank is the cause.
        """
        if self._closed:
            return
        own = error is not None and not isinstance(error, ParallelError) and not _is_transfer(error)
        said = {"where": self.where, "error": f"{type(error).__name__}: {error}" if own else ""}
        try:
            self._store.set(self._key(self.rank), json.dumps(said))
        except Exception as lost:
            self._close()
            if own:
                return
            raise ParallelError(
                f"rank {self.ranks[self.rank]}, {self.where}: the store of the process group no longer answers. The process "
                "that holds it (rank 0, or torchrun) is gone"
            ) from lost
        self._close()
        if own or (isinstance(error, ParallelError) and error.args and getattr(error, "said", False)):
            return
        raise self._diagnosis(error) from error

    def _diagnosis(self, error: BaseException | None) -> ParallelError:
        end = time.monotonic() + min(GRACE, self.timeout)
        stopped: dict[int, dict[str, Any]] = {}
        missing: list[int] = []
        while True:
            with contextlib.suppress(Exception):
                stopped = self._stopped()
            missing = [rank for rank in range(self.size) if rank not in stopped]
            causes = {rank: said for rank, said in stopped.items() if said["error"]}
            if not missing or causes or time.monotonic() > end:
                break
            time.sleep(0.05)
        here = f"rank {self.ranks[self.rank]}, {self.where}"
        if causes:
            rank, said = next(iter(causes.items()))
            found = ParallelError(f"{here}: rank {self.ranks[rank]} stopped in {said['where']}: {said['error']}")
        elif missing:
            names = " and ".join(f"rank {self.ranks[rank]}" for rank in missing)
            found = ParallelError(
                f"{here}: {names} did not answer within {self.timeout:g} s: gone, or late. A run needs all ranks; "
                "flexclear.parallel.enable(timeout=...) says how long to wait"
            )
        else:
            found = ParallelError(f"{here}: a transfer between ranks failed: {error}")
        found.said = True  # type: ignore[attr-defined]
        return found

    def _close(self) -> None:
        self._closed = True
        for group in self._groups.values():
            with contextlib.suppress(Exception):
                group.abort()
        self._groups = {}

    def close(self) -> None:
        """Give everything back."""
        self._close()

    def _group(self, device: torch.device, purpose: str) -> Any:
        # On a GPU sums and borders have a communicator each: in one, a sum would wait for borders that are not needed yet.
        kind = f"{device.type}-{purpose}" if device.type == "cuda" else "cpu"
        if self._closed:
            raise ParallelError(f"rank {self.ranks[self.rank]}, {self.where}: this run has ended with an error already")
        if kind not in self._groups:
            store = dist.PrefixStore(f"{self._generation}/{kind}", self._store)
            limit = timedelta(seconds=self.timeout)
            try:
                if device.type == "cuda":
                    options = dist.ProcessGroupNCCL.Options()
                    options._timeout = limit
                    self._groups[kind] = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
                else:
                    self._groups[kind] = dist.ProcessGroupGloo(store, self.rank, self.size, limit)
            except RuntimeError as error:
                self.fail(error)
                raise
        return self._groups[kind]

    def wait(self, work: Any, rank: int | None = None) -> None:
        """Wait for a transfer.

        Args:
            work: its handle.
            rank: the other end, where there is one.

        Raises:
            ParallelError: it did not come about in time.
        """
        if work is None:
            return
        try:
            work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            self.fail(_Transfer(str(error)))
            raise

    @contextlib.contextmanager
    def _transfer(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, ParallelError):
                raise
            self.fail(_Transfer(str(error)))
            raise

    # Transfers

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Sequence[int]], like: Tensor, kind: str = "border"
    ) -> Pending:
        """Send to some ranks and receive from some.

        Args:
            sends: contiguous tensors by destination.
            receives: shapes by source.
            like: of the type and device that is received.
            kind: under which bytes are counted.
        """
        pending = Pending(self, {source: like.new_empty(shape) for source, shape in receives.items()})
        self._tag += 1  # on ranks that have nothing to say, too: both ends of a later transfer must give it one tag
        if not sends and not receives:
            return pending
        group = self._group(like.device, kind)
        batched = like.device.type == "cuda"
        with self._transfer():
            if batched:
                group._start_coalescing()
            # Every pair in the same order on both sides: a communicator may take one at a time.
            for other in sorted({*sends, *receives}):
                for turn in ("send", "receive") if self.rank < other else ("receive", "send"):
                    if turn == "send" and other in sends:
                        pending.sent.append(sends[other])
                        pending.works.append((other, group.send([sends[other]], other, self._tag)))
                        self.sent[kind] += sends[other].numel() * sends[other].element_size()
                    elif turn == "receive" and other in receives:
                        pending.works.append((other, group.recv([pending.received[other]], other, self._tag)))
            if batched:
                pending.works = [(self.rank, group._end_coalescing())]
        return pending

    def start_sum(self, tensor: Tensor, kind: str, greatest: bool = False) -> Pending:
        """Sum (or greatest) over all ranks, in place."""
        pending = Pending(self, {self.rank: tensor})
        if self.size > 1:
            with self._transfer():
                operation = dist.ReduceOp.MAX if greatest else dist.ReduceOp.SUM
                pending.works.append((self.rank, self._group(tensor.device, "sum").allreduce([tensor], operation)))
            self.sent[kind] += tensor.numel() * tensor.element_size()
        return pending

    def gather(self, tensor: Tensor, sizes: Sequence[int], dim: int, kind: str) -> list[Tensor]:
        """Every rank's tensor, which have ``sizes`` along ``dim``."""
        if self.size == 1:
            return [tensor]
        most = max(sizes)
        moved = tensor.movedim(dim, 0)
        padded = moved.new_zeros(most, *moved.shape[1:])
        padded[: len(moved)] = moved
        data = padded.flatten().view(torch.uint8)  # not every type is known to every way of gathering
        everyone = [torch.empty_like(data) for _ in sizes]
        with self._transfer():
            work = self._group(tensor.device, "sum").allgather([everyone], [data])
        self.wait(work)
        self.sent[kind] += len(data)
        whole = (part.view(padded.dtype).view(padded.shape) for part in everyone)
        return [part[:size].movedim(0, dim) for part, size in zip(whole, sizes, strict=True)]

    def broadcast(self, tensor: Tensor, source: int, kind: str) -> Tensor:
        """The tensor of one rank on all, in place."""
        if self.size > 1:
            with self._transfer():
                options = dist.BroadcastOptions()
                options.rootRank = source
                work = self._group(tensor.device, "sum").broadcast([tensor], options)
            self.wait(work)
            if self.rank == source:
                self.sent[kind] += tensor.numel() * tensor.element_size()
        return tensor

    def tell(self, message: Any) -> list[Any]:
        """What every rank says, as JSON, in the order of ranks. Names the rank that does not answer."""
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        others = [rank for rank in range(self.size) if rank != self.rank]
        length = torch.tensor([len(data)])
        lengths = self.exchange(dict.fromkeys(others, length), dict.fromkeys(others, (1,)), length, "control").wait()
        shapes = {rank: (int(lengths[rank]),) for rank in others}
        found = self.exchange(dict.fromkeys(others, data), shapes, data, "control").wait()
        found[self.rank] = data
        return [json.loads(bytes(found[rank].numpy())) for rank in range(self.size)]


class _Transfer(RuntimeError):
    """A transfer could not be begun."""


def _is_transfer(error: BaseException) -> bool:
    """Whether an error is one of the transport."""
    if isinstance(error, _Transfer):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "NCCL", "Connection", "Timed out", "Operation timed out", "Socket")
    )
