"""A Ray cluster, its nodes, and whether they can do a job."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pickle
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flexclear.cluster import probe
from flexclear.cluster.job import Job
from flexclear.common.extras import require
from flexclear.common.versions import versions

logger = logging.getLogger("flexclear")

ANSWER_SECONDS = 300
"""Seconds within which a node must have checked its files."""

REACH_SECONDS = 5
"""Seconds within which a cluster's address must accept a connection."""

LOCAL, FOUND = "local", "auto"

AUTH_MODE, AUTH_TOKENS = "RAY_AUTH_MODE", ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Ray's environment variables: whether calls need a token; the token itself, or a file that holds it."""


@dataclass(frozen=True)
class Node:
    """One machine: its id, address, and how many of its CPUs and GPUs the cluster has."""

    id: str
    address: str
    cpus: float
    gpus: float

    @property
    def label(self) -> str:
        return f"node {self.address} ({self.id[:8]})"


@dataclass(frozen=True)
class Cluster:
    """Where actors go.

    Attributes:
        ray: the module, connected.
        nodes: nodes that have room for an actor.
        gpus: whether each actor has a GPU.
    """

    ray: Any
    nodes: tuple[Node, ...]
    gpus: bool

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def actors(self, asked: int | None) -> int:
        """Number of actors: as requested; else one per GPU, or one per node without GPUs."""
        if asked is not None:
            return asked
        return int(sum(node.gpus for node in self.nodes)) if self.gpus else len(self.nodes)

    def resources(self, actors: int) -> dict[str, float]:
        """Resources of each of ``actors`` actors: a GPU, or an equal share of the CPUs, which is its number of threads."""
        if self.gpus:
            return {"num_gpus": 1, "num_cpus": 0}
        share = min(sum(node.cpus for node in self.nodes) // actors, min(node.cpus for node in self.nodes))
        return {"num_cpus": max(1, int(share))}

    def label(self, node_id: str) -> str:
        """Name of a node in messages, also if it joined later."""
        found = next((node for node in (*self.nodes, *_nodes(self.ray)) if node.id == node_id), None)
        return f"node {node_id[:8]}" if found is None else found.label

    def check(self, job: Job) -> None:
        """Ask every node whether it can do a job.

        Raises:
            ValueError: a node cannot; the message names all such nodes with all reasons.
        """
        from ray.cloudpickle import register_pickle_by_value, unregister_pickle_by_value
        from ray.exceptions import GetTimeoutError, RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        # A worker process ends after the check: what it imported without a GPU is no use to an actor with one.
        task = self.ray.remote(num_cpus=0, max_calls=1, max_retries=0)(probe.examine)
        register_pickle_by_value(probe)
        try:
            asked = [
                task.options(scheduling_strategy=On(node.id, soft=False)).remote(
                    pickle.dumps(job), os.getcwd(), versions(), probe.needs_token()
                )
                for node in self.nodes
            ]
        finally:
            unregister_pickle_by_value(probe)
        problems = []
        for node, answer in zip(self.nodes, asked, strict=True):
            try:
                problems += [f"{node.label}: {text}" for text in self.ray.get(answer, timeout=ANSWER_SECONDS)]
            except GetTimeoutError:
                problems.append(f"{node.label} has not answered in {ANSWER_SECONDS} s")
            except RayError as error:
                problems.append(f"{node.label}: {first_line(error)}")
        if problems:
            raise ValueError(f"--ray: not every node can do this. {'; '.join(problems)}")


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield the module ``ray``, connected to a cluster; disconnect afterwards.

    Args:
        address: ``HOST:PORT``; ``"auto"``: the cluster that this machine is a node of; ``"local"``: one on this machine alone,
            started for the job.

    Raises:
        ImportError: Ray is not installed.
        OSError: there is no such cluster, or it accepts no calls from this process.
        ValueError: this is not an address.
    """
    check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        raise ValueError("--ray: this process is connected to a Ray cluster already")
    options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    with _authenticated(address):
        try:
            # Otherwise, workers' prints would go to standard output, where results are.
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
            text = f"--ray {address}: this cluster cannot be used: {first_line(error)}"
            if isinstance(error, ConnectionError) and probe.needs_token() is False:
                text += " (if it requires a token: set RAY_AUTH_MODE=token, and save the token as ~/.ray/auth_token)"
            raise OSError(text) from error
        results = sys.stdout
        aside: Any = _WithoutRay(results)
        sys.stdout = aside
        try:
            yield ray
        finally:
            aside.ending = True
            ray.shutdown()
            if sys.stdout is aside:
                sys.stdout = results


@contextlib.contextmanager
def _authenticated(address: str) -> Iterator[None]:
    """Undo afterwards what Ray changes about authentication in this process.

    When ``ray.init`` starts a cluster, it switches tokens on for the whole process and leaves them on. A later cluster without
    tokens could then not call this process, and all its actors would be lost. A cluster that is started here gets its own
    temporary token. Otherwise Ray would save one in the user's home directory, and clusters started later would require it too.
    """
    names = (AUTH_MODE, *AUTH_TOKENS)
    before = {name: os.environ.get(name) for name in names}
    if address == LOCAL and not any(before.values()):
        os.environ[AUTH_TOKENS[0]] = secrets.token_hex(32)
    try:
        yield
    finally:
        if before != {name: os.environ.get(name) for name in names}:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            _read_authentication_again()


def _read_authentication_again() -> None:
    """Make Ray read its environment variables again: it caches the mode and the token per process."""
    try:
        raylet: Any = importlib.import_module("ray._raylet")
        mode, token = raylet.Config, raylet.AuthenticationTokenLoader
    except (ImportError, AttributeError):  # another release may differ: ``Cluster.check`` finds a mismatch
        return
    mode.initialize(
        ""
    )  # first: a Ray thread that is still ending would fail without the token if the mode required one
    token.instance().reset_cache()


class _WithoutRay:
    """A stream without Ray's output, which comes from a separate thread and at the end: Ray prints the end of a lost node's
    log on standard output, where results are. Those lines become log records for ``--verbose``.

    Attributes:
        ending: whether everything written from now on is Ray's.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.ending = False

    def write(self, text: str) -> int:
        if not self.ending and not threading.current_thread().name.startswith("ray_"):
            return self._stream.write(text)
        for line in filter(str.strip, text.splitlines()):
            logger.debug(line)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def cluster_at(address: str, device: str) -> Iterator[Cluster]:
    """Connect to a cluster for a job on ``device``; see ``connected`` and ``cluster_of``."""
    with connected(address) as ray:
        yield cluster_of(ray, device)


def cluster_of(ray: Any, device: str) -> Cluster:
    """Where a job on ``device`` (``"auto"``, ``"cuda"`` or ``"cpu"``) runs. ``"auto"``: on GPUs if there are any.

    Raises:
        ValueError: there is no suitable node.
    """
    nodes = _nodes(ray)
    with_gpus = tuple(node for node in nodes if node.gpus >= 1)
    if device == "cuda" and not with_gpus:
        raise ValueError(f"--device cuda: no node of this cluster has a GPU; it has {len(nodes)} nodes")
    if with_gpus and device != "cpu":
        return Cluster(ray, with_gpus, True)
    with_cpus = tuple(node for node in nodes if node.cpus >= 1)
    if not with_cpus:
        raise ValueError(f"--ray: no node of this cluster has a CPU to work with; it has {len(nodes)} nodes")
    return Cluster(ray, with_cpus, False)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _nodes(ray: Any) -> list[Node]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0),
            node["Resources"].get("GPU", 0),
        )
        for node in alive
    ]


def check_address(address: str) -> None:
    """Raise if there is no cluster, as far as that can be known without importing Ray.

    Raises:
        ImportError, OSError, ValueError: see ``connected``.
    """
    require("ray", "--ray")
    if address in (LOCAL, FOUND):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise ValueError(
            f"--ray must be HOST:PORT of a cluster that this machine is a node of, {FOUND!r} to find that one, or {LOCAL!r} "
            f"for the GPUs of this machine; got {address!r}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise OSError(f"--ray {address}: no cluster can be reached there: {error}") from error
