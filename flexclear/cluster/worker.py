"""The process of an actor."""

from __future__ import annotations

import os
from typing import Any

from flexclear.cluster.job import Job, Work


def enter(folder: str) -> None:
    """Change to the driver's working directory if the node has it, so that relative paths mean the same files."""
    if os.path.isdir(folder):
        os.chdir(folder)


class Worker:
    """Holds a job with its pipeline, and does one call at a time.

    Args:
        folder: see ``enter``.
    """

    def __init__(self, folder: str) -> None:
        enter(folder)
        self._work: Work | None = None

    def place(self) -> str:
        """Id of the node. Answers as soon as the cluster has room."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def prepare(self, job: Job) -> tuple[dict[str, Any], list[str]]:
        """Load; return what must be equal in all workers, and messages for the user."""
        self._work = job.open()
        return self._work.told, self._work.remarks

    def run(self, payload: Any) -> Any:
        """Do one call."""
        assert self._work is not None
        return self._work.run(payload)
