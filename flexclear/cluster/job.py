"""The interface of a job: nodes can check it, and a worker opens it."""

from __future__ import annotations

from typing import Any, Protocol


class Work(Protocol):
    """A job in a worker, with its pipeline loaded.

    Attributes:
        told: what must be equal in all workers, in a form that JSON can hold.
        remarks: messages for the user.
    """

    told: dict[str, Any]
    remarks: list[str]

    def run(self, payload: Any) -> Any:
        """Do one call."""


class Job(Protocol):
    """A job as it is sent to the nodes.

    Attributes:
        files: what ``look`` returns if a node's files match those of the process that owns the job.
    """

    @property
    def files(self) -> tuple[str, ...]: ...

    def look(self) -> tuple[str, ...]:
        """Fingerprint the job's files on a node; raise if some are missing there. Imports little."""

    def open(self) -> Work:
        """Check what depends on the device, and load."""
