"""What a job is to the cluster: something that nodes can be asked about, and that a worker opens."""

from __future__ import annotations

from typing import Any, Protocol


class Work(Protocol):
    """A job in a worker, its pipeline loaded.

    Attributes:
        told: what must be equal in all workers, as JSON can hold it.
        remarks: lines for people.
    """

    told: dict[str, Any]
    remarks: list[str]

    def run(self, payload: Any) -> Any:
        """Do one call."""


class Job(Protocol):
    """A job as it travels to the nodes.

    Attributes:
        files: what ``look`` returns where the files are those of the process that has the job.
    """

    @property
    def files(self) -> tuple[str, ...]: ...

    def look(self) -> tuple[str, ...]:
        """Fingerprints of the files that the job reads, on a node; raises for what is missing there. Imports little."""

    def open(self) -> Work:
        """Check what depends on the device, and load."""
