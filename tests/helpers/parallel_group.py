"""Processes of one group that are started once and run many cases, which are functions in the modules of ``CASES``."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

TESTS = Path(__file__).parents[1]
CASES = (
    "helpers.parallel_cases",
    "helpers.parallel_clips",
    "helpers.parallel_families",
    "helpers.parallel_pipelines",
    "helpers.parallel_faults",
    "helpers.parallel_ends",
    "helpers.distill_cases",
    "contract.ranks",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Group:
    """``size`` processes with a gloo process group, forked from a server that has imported everything already.

    If one does not answer in time or has died, all of them are ended, and the next task gets new ones: pending answers of the
    old ones are lost with their pipes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.number = 0
        self.pipes, self.processes = [], []
        self.start()

    def start(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # The server imports preloaded modules with the path from its environment.
        folders = [str(TESTS), str(TESTS / "families")]
        os.environ["PYTHONPATH"] = os.pathsep.join(
            dict.fromkeys([*folders, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        )
        sys.path[:0] = [folder for folder in folders if folder not in sys.path]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(CASES))
        port = free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, name: str, *args, timeout: float = 600.0, gone: tuple[int, ...] = (), **kwargs):
        """What the function ``name`` of ``CASES`` returns on each rank; an exception is returned as its type's name and text.

        ``gone``: ranks that end while they run it, for which None is returned.
        """
        if not self.processes:
            self.start()
        self.number += 1
        try:
            for pipe in self.pipes:
                pipe.send((self.number, name, args, kwargs))
            found = [
                None if rank in gone else self._answer(rank, f"{name}{args}", timeout) for rank in range(self.size)
            ]
        except BaseException:
            self.kill()
            raise
        if gone:
            self.kill()
        return found

    def _answer(self, rank: int, task: str, timeout: float):
        if not self.pipes[rank].poll(timeout):
            raise TimeoutError(f"rank {rank} of {self.size} did not finish {task} within {timeout} s")
        try:
            number, answer = self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join(10)
            code = self.processes[rank].exitcode
            raise ChildProcessError(f"rank {rank} of {self.size} ended in {task}, exit status {code}") from None
        assert number == self.number, f"rank {rank} answers task {number}, and was given {self.number}"
        return answer

    def results(self, name: str, *args, **kwargs):
        """Like ``run``, but no rank may raise."""
        found = self.run(name, *args, **kwargs)
        for rank, (kind, value) in enumerate(found):
            assert kind == "result", f"rank {rank}: {value}"
        return [value for _, value in found]

    def errors(self, name: str, *args, **kwargs):
        """Like ``run``, but every rank must raise: (type, message) of each, or None for a rank that is gone."""
        found = self.run(name, *args, **kwargs)
        for rank, answer in enumerate(found):
            assert answer is None or answer[0] == "error", f"rank {rank} did not raise: {answer}"
        return [None if answer is None else answer[1] for answer in found]

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        """End all processes at once."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []


def _serve(rank, size, port, pipe):
    import torch
    import torch.distributed as dist

    faulthandler.enable()  # a process that crashes says where
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    os.environ["LOCAL_RANK"] = str(rank)
    cases = [importlib.import_module(name) for name in CASES]

    while (task := pipe.recv()) is not None:
        number, name, args, kwargs = task
        try:
            run = next(getattr(module, name) for module in cases if hasattr(module, name))
            answer = ("result", run(*args, **kwargs))
        except (Exception, KeyboardInterrupt) as error:
            text = (type(error).__name__, str(error))
            if os.environ.get("SHOW"):
                traceback.print_exc()
            answer = ("error", text)
        pipe.send((number, answer))
    if dist.is_initialized():
        dist.destroy_process_group()
