"""The process group to which the ranks belong."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from flexclear.parallel.errors import ParallelError


def ranks_of(mesh: Any, timeout: float | None = None) -> list[int]:
    """Global ranks of the group.

    Args:
        mesh: a one-dimensional ``DeviceMesh``, or None: all ranks.
        timeout: seconds to wait for the other ranks if the default process group has to be created; None: torch's default.

    Raises:
        ParallelError: ranks are missing.
        TypeError: ``mesh`` is not a DeviceMesh.
        ValueError: ``mesh`` has several dimensions or does not contain this rank, or there is no process group.
    """
    if not dist.is_available():
        raise ValueError("this build of torch has no torch.distributed")
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise ValueError(
                "there is no process group: start with torchrun --nproc-per-node N, or call "
                "torch.distributed.init_process_group first"
            )
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        _make_default_group("nccl" if cuda else "gloo", timeout)
    if mesh is None:
        return list(range(dist.get_world_size()))
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh or None, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, that of the bands; this one has {mesh.ndim}. Use one, such as "
            f"mesh[{(mesh.mesh_dim_names or ('bands',))[-1]!r}]"
        )
    ranks = mesh.mesh.flatten().tolist()
    if dist.get_rank() not in ranks:
        raise ValueError(f"rank {dist.get_rank()} is not in the mesh, which holds {ranks}")
    return ranks


def _make_default_group(backend: str, timeout: float | None) -> None:
    """
    Raises:
        ParallelError: ranks are missing.
    """
    from torch.distributed.rendezvous import rendezvous

    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    limit = dist.default_pg_timeout if timeout is None else timedelta(seconds=timeout)
    try:
        store, number, count = next(rendezvous("env://", timeout=limit))
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        who = "others" if rank == "0" else "rank 0"
        raise ParallelError(
            f"rank {rank}, set-up: waited {limit.total_seconds():g} s for {who} at {place}, and not all of {size} ranks arrived: "
            f"{str(error).splitlines()[0]}. Every rank must be started and call flexclear.parallel.enable"
        ) from error
    store.set_timeout(dist.default_pg_timeout)  # torch's default, for other users of this group
    dist.init_process_group(backend, store=dist.PrefixStore("default_pg", store), rank=number, world_size=count)


def leave() -> None:
    """Destroy this process's default process group at the end of a script, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
