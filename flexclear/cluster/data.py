"""``flexclear data generate --ray`` and ``flexclear data cache --ray``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexclear.cluster.connection import Cluster, cluster_at
from flexclear.cluster.crew import crew_for
from flexclear.cluster.drawing import calls_of, check_device, check_here, job_of
from flexclear.cluster.queue import Call
from flexclear.distill.caching import Cached, Encoder, Part, part_bytes
from flexclear.distill.caching import cache as cache_here
from flexclear.distill.drawing import DataPlan, Place, begin, checked
from flexclear.distill.models import fingerprint, load_pipeline, pipeline_folder
from flexclear.generation.check import choose_dtype
from flexclear.generation.generate import Drawn, Wish

Say = Callable[[str], None]


def draw_data(plan: DataPlan, address: str, actors: int | None = None, say: Say = lambda text: None) -> Iterator[Drawn]:
    """``flexclear.distill.drawing.draw_data`` on a cluster: yields the same files, in the order in which they finish.

    Args:
        plan: which images to draw.
        address: see ``flexclear.cluster.connection.connected``.
        actors: number of actors; None: one per GPU, or one per node without GPUs.
        say: called with messages for the user.

    Raises:
        OSError, TypeError, ValueError: the cluster cannot be reached, a node or worker cannot do this, or the folder holds
            other images.
        RuntimeError: actors are lost over and over.
    """
    if plan.shard != (0, 1):
        index, of = plan.shard
        raise ValueError(
            f"--shard {index}/{of} is a part of the images for one process, --ray shares them out by itself"
        )
    plan, setup = checked(plan, functools.partial(check_here, videos=False))
    with cluster_at(address, plan.settings.device) as cluster:
        left = begin(plan, setup.fingerprints, choose_dtype(plan.settings.dtype, torch.device(cluster.device)))
        if not left:
            return
        size = (plan.settings.sizes or setup.sizes or (None,))[0]
        single = {number: plan.single(number) for number in left}
        wishes = [Wish(number, one.prompts[0], size, one.seeds[0]) for number, one in single.items()]
        job = job_of(plan.settings, setup, cluster)
        with crew_for(job, cluster, actors, len(left), say) as (crew, _):
            for _, made in crew.run(calls_of([wish] for wish in wishes)):
                for one in made:
                    number = one.wish.number
                    yield one.at(Place(plan.path(number)).write(number, one.wish.prompt, one.content))


@dataclass(frozen=True)
class CachingJob:
    """Images and captions to encode.

    Attributes:
        source: path of the images, which every node must see.
        model: model whose encoders are used.
        size, text_len: as in ``flexclear.distill.caching.cache``.
        device, dtype: those of the encoders.
        files: fingerprint of the encoders' files.
    """

    source: str
    model: str
    size: tuple[int, int] | None
    text_len: int
    device: str
    dtype: torch.dtype
    files: tuple[str, ...]

    def look(self) -> tuple[str, ...]:
        """Fingerprint the encoders on this node.

        Raises:
            FileNotFoundError: the encoders or the images are missing.
        """
        if not Path(self.source).expanduser().exists():
            raise FileNotFoundError(f"no folder of images and no .tar file at {self.source}")
        return (fingerprint(pipeline_folder(self.model)),)

    def open(self) -> _Encoding:
        """Load the encoders.

        Raises:
            OSError, ValueError: they cannot be loaded.
        """
        pipe = load_pipeline(self.model, pipeline_folder(self.model), self.dtype, True)
        pipe.to(self.device)
        return _Encoding(Encoder(pipe, self.size, self.text_len))


class _Encoding:
    """Loaded encoders; see ``flexclear.cluster.job.Work``."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.told: dict[str, Any] = dict(encoder.factors)
        self.remarks: list[str] = []

    def run(self, payload: Part) -> bytes:
        """Make the contents of a part's file."""
        return part_bytes(payload, self._encoder)


def cache(
    source: str | Path,
    model: str,
    out: str | Path,
    address: str,
    actors: int | None = None,
    *,
    size: tuple[int, int] | None,
    text_len: int,
    shard_size: int,
    device: str,
    dtype: str,
    on_item: Callable[[int, int], None] = lambda done, total: None,
    say: Say = lambda text: None,
) -> Cached:
    """``flexclear.distill.caching.cache`` on a cluster: the same files. Each actor encodes one file of the cache at a time.

    Args:
        source, model, out, size, text_len, shard_size, on_item, say: as there.
        address, actors: see ``draw_data``.
        device, dtype: as in ``--device`` and ``--dtype``.

    Raises:
        See there and ``draw_data``.
    """
    check_device(device)
    with cluster_at(address, device) as cluster:
        kind = choose_dtype(dtype, torch.device(cluster.device))

        def elsewhere(parts: Sequence[Part]) -> Iterator[tuple[Part, bytes]]:
            made = fingerprint(pipeline_folder(model))
            job = CachingJob(str(source), model, size, text_len, cluster.device, kind, (made,))
            yield from _encoded(parts, job, cluster, actors, say)

        return cache_here(
            source,
            model,
            out,
            size=size,
            text_len=text_len,
            shard_size=shard_size,
            dtype=kind,
            elsewhere=elsewhere,
            on_item=on_item,
            say=say,
        )


def _encoded(
    parts: Sequence[Part], job: CachingJob, cluster: Cluster, actors: int | None, say: Say
) -> Iterator[tuple[Part, bytes]]:
    calls = [Call(part.name, None, len(part.items), part) for part in parts]
    with crew_for(job, cluster, actors, len(calls), say) as (crew, _):
        for call, content in crew.run(calls):
            yield call.payload, content
