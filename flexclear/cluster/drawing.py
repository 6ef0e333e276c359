"""Images and videos of ``flexclear generate --ray``, and the workers that draw them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexclear.cluster.connection import Cluster, cluster_at
from flexclear.cluster.crew import crew_for
from flexclear.cluster.queue import Call
from flexclear.common.versions import versions
from flexclear.generation.settings import GenerateSettings, controlnet_folder, model_folder

if TYPE_CHECKING:
    from flexclear.generation.check import Setup
    from flexclear.generation.generate import Drawn, Wish

DEVICES = ("auto", "cuda", "cpu")


@dataclass(frozen=True)
class DrawingJob:
    """Images of one set.

    Attributes:
        settings: what to draw; the device is that of every worker.
        files: fingerprints, see ``flexclear.generation.check.Setup.fingerprints``.
    """

    settings: GenerateSettings
    files: tuple[str, ...]

    def look(self) -> tuple[str, ...]:
        """Fingerprint the files on this node.

        Raises:
            OSError, ValueError: one is missing or damaged.
        """
        from flexclear.generation.fingerprints import fingerprints_of

        settings = self.settings
        settings.check()
        weights = None
        if settings.weights is not None:
            from flexclear.generation.check import weights_file

            weights = weights_file(settings.weights)
        controlnet = "" if settings.controlnet is None else controlnet_folder(settings.controlnet, settings.model)
        return fingerprints_of(settings, model_folder(settings.model), weights, controlnet)

    def open(self) -> _Drawing:
        """Check what depends on the device, and load.

        Raises:
            OSError, TypeError, ValueError: it cannot be drawn here.
        """
        from flexclear.generation.check import check
        from flexclear.generation.generate import Drawer, load

        remarks: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            # Nothing is written here, but a video's format depends on its target's name.
            out = Path(folder) / (self.settings.out.name or "images")
            out.mkdir()
            settings = replace(self.settings, out=out, overwrite=False, resume=False)
            setup = check(settings, videos=True)
        if setup.recipe is not None:
            remarks.append(f"quantizing with recipe {setup.recipe}")
        return _Drawing(Drawer(load(settings, setup, remarks.append), settings, setup), remarks)


class _Drawing:
    """A loaded pipeline; see ``flexclear.cluster.job.Work``."""

    def __init__(self, drawer: Any, remarks: list[str]) -> None:
        self._drawer = drawer
        self.told, self.remarks = drawer.told, remarks

    def run(self, payload: Sequence[Wish]) -> list[Any]:
        """Draw the wishes; return a ``flexclear.generation.generate.Made`` for each."""
        return list(self._drawer.draw(payload))


def job_of(settings: GenerateSettings, setup: Setup, cluster: Cluster) -> DrawingJob:
    """Make the job for workers of a cluster.

    Args:
        settings: what to draw.
        setup: from ``check_here``.
        cluster: the cluster.
    """
    return DrawingJob(replace(settings, device=cluster.device), setup.fingerprints)


def calls_of(groups: Iterable[Sequence[Wish]]) -> list[Call]:
    """Turn groups of images that are drawn together into calls of ``DrawingJob``."""
    return [
        Call(_name(group), group[0].size, len(group) * math.prod(group[0].size or (1,)), tuple(group))
        for group in groups
    ]


def _name(wishes: Sequence[Wish]) -> str:
    first, last = wishes[0].number, wishes[-1].number
    return f"image {first}" if first == last else f"images {first} to {last}"


def check_here(settings: GenerateSettings, videos: bool = True) -> Setup:
    """``flexclear.generation.check.check`` for images drawn on other machines: this one needs no GPU.

    Raises:
        See there; and ValueError: an option does not work with a cluster.
    """
    from flexclear.generation.check import check

    if settings.parallel:
        raise ValueError("--ray draws many images, each on one GPU, and --parallel one image on several; leave one out")
    if settings.stages is not None:
        raise ValueError("--stages keeps files where an image is drawn, on any node of --ray; leave one of them out")
    check_device(settings.device)
    return check(replace(settings, device="cpu", recipe=None, offload=None), videos)


def check_device(device: str) -> None:
    """Raise for a ``--device`` that leaves the cluster no choice.

    Raises:
        ValueError: it names one device of several, or another kind.
    """
    if device not in DEVICES:
        raise ValueError(
            f"--device {device}: with --ray the cluster gives each actor its GPU; leave it out, or give 'cpu'"
        )


def draw(
    settings: GenerateSettings,
    setup: Setup,
    address: str,
    actors: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_kept: Callable[[Path], None] = lambda path: None,
) -> Iterator[Drawn]:
    """``flexclear.generation.generate.load`` and ``draw`` on a cluster: the same files, in the order in which they finish.

    Args:
        settings: what to draw.
        setup: from ``check_here``.
        address: see ``flexclear.cluster.connection.connected``.
        actors: number of actors; None: one per GPU, or one per node without GPUs.
        say: called with messages for the user.
        on_kept: called with the path of each image that is already finished.

    Raises:
        OSError, TypeError, ValueError: the cluster cannot be reached, or a node or worker cannot do this.
        RuntimeError: actors are lost over and over.
    """
    from flexclear.generation.generate import in_calls, wishes_of
    from flexclear.generation.resuming import find_finished
    from flexclear.images.files import numbered

    wishes = wishes_of(settings, setup)
    with (
        cluster_at(address, settings.device) as cluster,
        crew_for(job_of(settings, setup, cluster), cluster, actors, len(wishes), say) as (crew, told),
    ):
        target = setup.target
        kept: dict[int, Path] = {}
        if settings.resume:
            kept, target = find_finished(target, [{**wish.told, **told} for wish in wishes], versions())
            for path in kept.values():
                on_kept(path)
        elif not target.is_file and not target.overwrite:
            # Images arrive in any order, but have the numbers that they would have had in sequence.
            target = replace(target, first=max((number for number, _ in numbered(target.path)), default=0) + 1)
        left = [wish for wish in wishes if wish.number not in kept]
        for _, made in crew.run(calls_of(in_calls(left, settings.batch))):
            for one in made:
                yield one.at(target.write(one.wish.number, one.wish.prompt, one.content))
