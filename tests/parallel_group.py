"""Processes of one group that are started once and run many cases; what they run is in the modules of ``CASES``."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

HERE = str(Path(__file__).parent)
CASES = ("parallel_cases", "parallel_families", "parallel_pipelines", "parallel_faults", "distill_cases")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Group:
    """``size`` processes with a gloo process group, forked from a server that has imported everything already."""

    def __init__(self, size: int) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # The server imports what is preloaded with the path that its environment gives it.
        folders = [HERE, str(Path(HERE) / "families")]
        os.environ["PYTHONPATH"] = os.pathsep.join(
            dict.fromkeys([*folders, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        )
        sys.path[:0] = [folder for folder in folders if folder not in sys.path]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(CASES))
        port = free_port()
        self.size = size
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, name: str, *args, timeout: float = 120.0, gone: tuple[int, ...] = (), **kwargs):
        """What the function ``name`` of ``CASES`` returns on each rank; an exception is given back as its type's name and text.

        ``gone``: ranks that end while they run it; None is in their place.
        """
        for pipe in self.pipes:
            pipe.send((name, args, kwargs))
        found = []
        for rank, pipe in enumerate(self.pipes):
            if rank in gone:
                found.append(None)
                continue
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} of {self.size} did not finish {name}{args} within {timeout} s")
            found.append(pipe.recv())
        return found

    def results(self, name: str, *args, **kwargs):
        """The same where no rank may raise."""
        found = self.run(name, *args, **kwargs)
        for rank, (kind, value) in enumerate(found):
            assert kind == "result", f"rank {rank}: {value}"
        return [value for _, value in found]

    def errors(self, name: str, *args, **kwargs):
        """The same where every rank must raise: (type, message) of each; None where a rank is gone."""
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
            if process.is_alive():
                process.kill()


def _serve(rank, size, port, pipe):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    os.environ["LOCAL_RANK"] = str(rank)
    cases = [importlib.import_module(name) for name in CASES]

    while (task := pipe.recv()) is not None:
        name, args, kwargs = task
        try:
            run = next(getattr(module, name) for module in cases if hasattr(module, name))
            answer = ("result", run(*args, **kwargs))
        except Exception as error:
            text = (type(error).__name__, str(error))
            if os.environ.get("SHOW"):
                traceback.print_exc()
            answer = ("error", text)
        pipe.send(answer)
    if dist.is_initialized():
        dist.destroy_process_group()
