"""Transfers between ranks: sends, sums, gathers, and the count of bytes.

Process groups are created directly from rank and store, not through ``torch.distributed.new_group``. They can then be discarded
after an error and created again under another name, which allows a second run in the same processes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from flexclear.parallel.errors import ParallelError
from flexclear.parallel.notes import Notes
from flexclear.parallel.waiting import wait_for

GRACE = 10.0
"""Seconds that a rank has to say why it stopped after another rank has noticed."""


@dataclass
class Pending:
    """Transfers in progress.

    Attributes:
        received: the tensor from each source, complete after ``wait``.
        works: handles of the transfers.
        sent: tensors that are kept alive until they are sent.
    """

    transfers: Transfers
    received: dict[int, Tensor] = field(default_factory=dict)
    works: list[Any] = field(default_factory=list)
    sent: list[Tensor] = field(default_factory=list)

    def wait(self) -> dict[int, Tensor]:
        """Wait for all transfers.

        Raises:
            ParallelError: a rank is late or gone.
        """
        for work in self.works:
            self.transfers.wait(work)
        self.works, self.sent = [], []
        return self.received


class Transfers(ABC):
    """The transfers of one group of ranks.

    Args:
        ranks: global ranks, in the order of the bands.
        timeout: seconds after which a rank counts as late.
        name: distinguishes the groups of one process; the same on all ranks.

    Attributes:
        rank: this process's place in ``ranks``.
        notes: messages that ranks exchange in addition to transfers.
        sent: payload bytes that this rank has sent, by kind. Sums and gathers count with this rank's contribution.
    """

    def __init__(self, ranks: Sequence[int], timeout: float, name: str) -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.timeout = timeout
        self.sent: Counter[str] = Counter()
        members = "-".join(map(str, self.ranks))  # several groups of one world share a store
        self._store = dist.PrefixStore(f"flexclear/{name}/{members}", _get_default_store())
        self.notes = Notes(self._store, self.ranks, self.rank)
        self._groups: dict[str, Any] = {}
        self._tag = 0

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @abstractmethod
    def _watch(self) -> None:
        """Look for notes of the other ranks; an exception ends a wait."""

    @abstractmethod
    def _lost(self, error: TransferError) -> NoReturn:
        """Raise the error that explains a failed transfer."""

    # Process groups

    def _open_groups(self) -> None:
        self._tag = 0
        self._groups = {"cpu": self._make("cpu")}

    def _close_groups(self) -> None:
        groups, self._groups = list(self._groups.values()), {}
        for group in groups:
            with contextlib.suppress(Exception):
                group.abort()
        if groups:
            # Destroying them waits for pending sums, up to the full time-out if a rank is halted.
            del group
            end = threading.Thread(target=groups.clear, name="flexclear-close", daemon=True)
            end.start()
            end.join(2.0)

    def _group(self, device: torch.device, purpose: str) -> Any:
        # On a GPU, sums and borders have separate communicators: in one, a sum would wait for borders that are not needed yet.
        kind = f"{device.type}-{purpose}" if device.type == "cuda" else "cpu"
        if not self._groups:
            raise ParallelError(f"{self.notes.here}: this run has ended with an error already")
        if kind not in self._groups:
            self._groups[kind] = self._make(kind)
        return self._groups[kind]

    def _make(self, kind: str) -> Any:
        store = dist.PrefixStore(f"{self.notes.generation}/{kind}", self._store)
        limit = timedelta(seconds=self.timeout)
        with self._transfer():
            if kind != "cpu":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = limit
                return dist.ProcessGroupNCCL(store, self.rank, self.size, options)
            # The constructor waits for the other ranks, any of which may stop in the meantime.
            make = functools.partial(dist.ProcessGroupGloo, store, self.rank, self.size, limit)
            return wait_for(make, self.timeout + GRACE, self._watch)

    def wait(self, work: Any) -> None:
        """Wait for a transfer.

        Raises:
            ParallelError: it did not finish in time.
        """
        if work is not None:
            with self._transfer():
                work.wait(timedelta(seconds=self.timeout))

    @contextlib.contextmanager
    def _transfer(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, TimeoutError) as error:
            if isinstance(error, ParallelError):
                raise
            self._lost(TransferError(str(error)))

    # Transfers

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Sequence[int]], like: Tensor, kind: str = "border"
    ) -> Pending:
        """Send to some ranks and receive from some.

        Args:
            sends: contiguous tensors by destination.
            receives: shapes by source.
            like: tensor with the dtype and device of the received tensors.
            kind: the kind under which bytes are counted.
        """
        pending = Pending(self, {source: like.new_empty(shape) for source, shape in receives.items()})
        self._tag += 1  # also on ranks with nothing to send: both ends of a later transfer must use the same tag
        if not sends and not receives:
            return pending
        group = self._group(like.device, kind)
        batched = like.device.type == "cuda"
        with self._transfer():
            if batched:
                group._start_coalescing()
            # Both sides issue each pair's transfers in a matching order: a communicator may run one at a time.
            for other in sorted({*sends, *receives}):
                for turn in ("send", "receive") if self.rank < other else ("receive", "send"):
                    if turn == "send" and other in sends:
                        pending.sent.append(sends[other])
                        pending.works.append(group.send([sends[other]], other, self._tag))
                        self.sent[kind] += sends[other].numel() * sends[other].element_size()
                    elif turn == "receive" and other in receives:
                        pending.works.append(group.recv([pending.received[other]], other, self._tag))
            if batched:
                pending.works = [group._end_coalescing()]
        return pending

    def start_sum(self, tensor: Tensor, kind: str, greatest: bool = False) -> Pending:
        """Start a sum (or maximum) over all ranks, in place."""
        pending = Pending(self, {self.rank: tensor})
        if self.size > 1:
            with self._transfer():
                operation = dist.ReduceOp.MAX if greatest else dist.ReduceOp.SUM
                pending.works.append(self._group(tensor.device, "sum").allreduce([tensor], operation))
            self.sent[kind] += tensor.numel() * tensor.element_size()
        return pending

    def gather(self, tensor: Tensor, sizes: Sequence[int], dim: int, kind: str) -> list[Tensor]:
        """The tensors of all ranks, which have ``sizes`` along ``dim``."""
        if self.size == 1:
            return [tensor]
        most = max(sizes)
        moved = tensor.movedim(dim, 0)
        padded = moved.new_zeros(most, *moved.shape[1:])
        padded[: len(moved)] = moved
        data = padded.flatten().view(torch.uint8)  # not every backend supports gathers of every dtype
        everyone = [torch.empty_like(data) for _ in sizes]
        with self._transfer():
            work = self._group(tensor.device, "sum").allgather([everyone], [data])
        self.wait(work)
        self.sent[kind] += len(data)
        whole = (part.view(padded.dtype).view(padded.shape) for part in everyone)
        return [part[:size].movedim(0, dim) for part, size in zip(whole, sizes, strict=True)]

    def broadcast(self, tensor: Tensor, source: int, kind: str) -> Tensor:
        """Broadcast the tensor of one rank to all, in place."""
        if self.size > 1:
            with self._transfer():
                options = dist.BroadcastOptions()
                options.rootRank = source
                work = self._group(tensor.device, "sum").broadcast([tensor], options)
            self.wait(work)
            if self.rank == source:
                self.sent[kind] += tensor.numel() * tensor.element_size()
        return tensor


class TransferError(ParallelError):
    """A transfer failed.

    Attributes:
        late: whether time ran out, rather than a connection being closed.
    """

    @property
    def late(self) -> bool:
        text = str(self).lower()
        return any(words in text for words in ("timed out", "timeout", "no answer within"))
