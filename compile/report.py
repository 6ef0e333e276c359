"""What was compiled in this process, how long it took, and why anything was recompiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KEPT = 1 << 14


@dataclass(frozen=True)
class Graph:
    """One compilation.

    Attributes:
        function: name of the compiled function, with its file and line.
        seconds: time from the start of tracing to the finished kernel.
        cause: why no earlier graph could be used; empty for a function's first.
        failure: why it failed; empty if it did not.
    """

    function: str
    seconds: float
    cause: str
    failure: str


@dataclass(frozen=True)
class CompileReport:
    """Every compilation of this process, in order. ``print`` it.

    Attributes:
        graphs: the compilations.
    """

    graphs: tuple[Graph, ...]

    @property
    def recompiles(self) -> tuple[Graph, ...]:
        """Compilations of functions that already had graphs."""
        return tuple(graph for graph in self.graphs if graph.cause)

    @property
    def seconds(self) -> float:
        """Total compilation time."""
        return sum(graph.seconds for graph in self.graphs)

    def since(self, earlier: CompileReport) -> CompileReport:
        """The compilations that came after ``earlier``."""
        return CompileReport(self.graphs[len(earlier.graphs) :])

    def __str__(self) -> str:
        lines = [f"{len(self.graphs)} graphs in {self.seconds:.1f} s, {len(self.recompiles)} of them recompiled"]
        for function in dict.fromkeys(graph.function for graph in self.graphs):
            own = [graph for graph in self.graphs if graph.function == function]
            lines.append(f"{function}: {len(own)} graphs, {sum(graph.seconds for graph in own):.1f} s")
            lines += [f"  again: {graph.cause}" for graph in own if graph.cause]
            lines += [f"  failed: {graph.failure}" for graph in own if graph.failure]
        return "\n".join(lines)


def remember_all_graphs() -> None:
    """Make torch keep all its records of compilations; by default it keeps the last 64."""
    from torch._dynamo import utils

    utils.set_compilation_metrics_limit(_KEPT)


def report() -> CompileReport:
    """The compilations of this process of which torch still has records: all since the first ``compile_blocks`` or
    ``optimize``, and up to 64 from before."""
    from torch._dynamo import utils

    return CompileReport(tuple(_graph(metrics) for metrics in _forward(utils.get_compilation_metrics())))


def _forward(records: Sequence[Any]) -> list[Any]:
    return [record for record in records if record.co_name is not None and record.is_forward is not False]


def _graph(record: Any) -> Graph:
    place = f"{Path(record.co_filename or '').name}:{record.co_firstlineno}"
    return Graph(
        function=f"{record.co_name} ({place})",
        seconds=record.entire_frame_compile_time_s or 0.0,
        cause=_first_line(record.recompile_reason),
        failure=_first_line(record.fail_reason),
    )


def _first_line(text: str | None) -> str:
    return next((line.strip(" -") for line in (text or "").splitlines() if line.strip()), "")
