"""``flexclear data generate``: the teacher's own images to learn from, with captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flexclear.generation.generate import GenerateSettings, Setup, check, draw, load
from flexclear.images.files import read_settings, write_whole
from flexclear.images.folder_settings import keep_settings


@dataclass(frozen=True)
class Place:
    """Where one image goes; used in place of ``flexclear.images.files.Target``."""

    path: Path

    def write(self, number: int, prompt: str, content: bytes) -> Path:
        # Write the caption first: an image that exists is finished.
        write_caption(self.path, prompt)
        return write_whole(self.path, content, overwrite=True)


def write_caption(picture: Path, prompt: str) -> None:
    """Write the caption of an image, in a ``.txt`` file beside it."""
    write_whole(picture.with_suffix(".txt"), f"{prompt}\n".encode(), overwrite=True)


@dataclass(frozen=True)
class DataPlan:
    """Which images to draw.

    Image i shows prompt i modulo the number of prompts, drawn with seed + i. So the images do not depend on the number of
    processes.

    Attributes:
        settings: model, prompts, folder and how to draw; ``seeds`` holds the first seed, ``sizes`` at most one size.
        count: images in total.
        shard: (i, n): only images i, i + n, ...
    """

    settings: GenerateSettings
    count: int
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        index, of = self.shard
        if not 0 <= index < of:
            raise ValueError(f"--shard I/N needs I from 0 to N - 1, got {index}/{of}")
        if self.count < 1:
            raise ValueError(f"--count must be 1 or more, got {self.count}")

    def single(self, number: int) -> GenerateSettings:
        """The settings of image ``number``."""
        prompts = self.settings.prompts
        return replace(
            self.settings, prompts=(prompts[number % len(prompts)],), seeds=(self.settings.seeds[0] + number,)
        )

    def path(self, number: int) -> Path:
        return self.settings.out / f"{number:06d}.png"

    def numbers(self) -> range:
        return range(self.shard[0], self.count, self.shard[1])

    def missing(self) -> list[int]:
        """Numbers of this shard's images that do not exist yet. ``draw_data`` compares the other settings.

        Raises:
            ValueError: an existing image shows another prompt or has another seed.
        """
        left = []
        for number in self.numbers():
            path = self.path(number)
            if not path.is_file():
                left.append(number)
                continue
            wanted = self.single(number)
            try:
                known = read_settings(path)["settings"]
                told = (known["prompt"], known["seed"], known["model"])
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(f"{path} exists, but this command did not write it: {error}") from error
            if told != (wanted.prompts[0], wanted.seeds[0], wanted.model):
                raise ValueError(
                    f"{path} shows {told[0]!r} by {told[2]} with seed {told[1]}; it would be "
                    f"{wanted.prompts[0]!r} by {wanted.model} with seed {wanted.seeds[0]}. Name another folder"
                )
        return left

    def check_folder(self, fingerprints: Sequence[str], dtype: torch.dtype) -> None:
        """Write the settings that all images share into ``settings.json`` in the folder, or compare them with it.

        For each image's own prompt and seed, see ``missing``: more images or prompts may be requested later.

        Raises:
            ValueError: the folder holds images with other or unknown settings.
        """
        settings = self.settings
        told = {
            "model": settings.model,
            "fingerprints": fingerprints,
            "sizes": settings.sizes,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "text_len": settings.text_len,
            "dtype": str(dtype).removeprefix("torch."),
        }
        keep_settings(settings.out, told, "Name another folder, or delete that one")


def draw_data(
    plan: DataPlan,
    *,
    say: Callable[[str], None] = lambda text: None,
    on_step: Callable[[int, int, int], None] = lambda picture, step, steps: None,
) -> Iterator[Any]:
    """Draw the missing images one by one. Each that is yielded (``flexclear.generation.generate.Drawn``) is on disk.

    Deleted captions of existing images are written again.

    Raises:
        See ``flexclear.generation.generate.check``, ``DataPlan.missing`` and ``DataPlan.check_folder``. Nothing happens before
        the first image is requested.
    """
    plan, setup = checked(plan, check)
    left = begin(plan, setup.fingerprints, setup.dtype)
    if not left:
        return
    pipe = load(plan.settings, setup, say)
    for number in left:
        place: Any = Place(plan.path(number))
        yield from draw(pipe, plan.single(number), replace(setup, target=place), on_step)


def checked(plan: DataPlan, check: Callable[[GenerateSettings], Setup]) -> tuple[DataPlan, Setup]:
    """Return the plan with ``~`` expanded in its folder, and what ``check`` found out.

    Raises:
        ValueError: its folder is a file; or see ``check``.
    """
    out = plan.settings.out.expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, but {out} is a file")
    plan = replace(plan, settings=replace(plan.settings, out=out))
    return plan, check(plan.settings)


def begin(plan: DataPlan, fingerprints: Sequence[str], dtype: torch.dtype) -> list[int]:
    """Return the numbers of the missing images, and write missing captions of the others.

    Args:
        plan: from ``checked``.
        fingerprints: those of the model's files.
        dtype: that of the model.

    Raises:
        See ``DataPlan.missing`` and ``DataPlan.check_folder``.
    """
    left = plan.missing()
    plan.check_folder(fingerprints, dtype)
    for number in sorted(set(plan.numbers()) - set(left)):
        if not plan.path(number).with_suffix(".txt").exists():
            write_caption(plan.path(number), plan.single(number).prompts[0])
    return left
