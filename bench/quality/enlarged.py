"""What bench/quality/highres.py draws: rows that draw large images at once, and rows that enlarge small ones."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import flexclear
from flexclear.compile.files import whole_file
from flexclear.embedded.captions import caption
from flexclear.embedded.evaluation import Request, generate
from flexclear.embedded.fingerprint import students_fingerprint, teacher_fingerprint
from flexclear.embedded.students import as_student, read_students
from flexclear.embedded.vocabulary import Vocabulary
from flexclear.highres import Stage, upscale_cascade

from bench.resume import check_settings

NATIVES = (128, 256)
"""Sides in pixels that the model and its students learned."""
TOKEN = 8
TEXT = 32


@dataclass(frozen=True)
class Settings:
    """How everything is drawn, except what the cascades' stages choose by themselves; see ``main``."""

    native: int
    r: int
    weights: str
    steps: int
    ntk_factor: float


DIRECT: dict[str, tuple[bool, bool, bool]] = {
    "dense": (False, False, False),
    "CLEAR": (True, False, False),
    "CLEAR + NTK": (True, True, False),
    "CLEAR + NTK + proportional": (True, True, True),
}
"""Rows that draw at the larger size at once: windows, NTK factor, proportional attention."""
OWN, DISTILLED = "own", "distilled"


@dataclass(frozen=True)
class Cascade:
    """A row that is enlarged.

    Attributes:
        method: of ``upscale_cascade``.
        windows: without them the stages are dense.
        changed: settings that differ from the defaults of ``upscale_cascade``.
    """

    method: str
    windows: bool = True
    changed: Mapping[str, Any] = field(default_factory=dict, hash=False)


WEAK = {"strength": 0.3}
"""A strength that keeps the shape; this model draws new shapes only at the sizes of its training."""
CASCADES = {
    "SDEdit, strength 0.3": Cascade("sdedit", changed=WEAK),
    "SDEdit": Cascade("sdedit"),
    "I-Max": Cascade("imax"),
    "SDEdit, strength 0.3, dense": Cascade("sdedit", False, WEAK),
    "SDEdit, dense": Cascade("sdedit", False),
    "I-Max, dense": Cascade("imax", False),
}
CHANGES: dict[str, dict[str, Any]] = {
    "strength 0.5": {"strength": 0.5},
    "NTK factor 1": {"ntk_factor": 1.0},
    "NTK factor 2": {"ntk_factor": 2.0},
    "no proportional attention": {"proportional_attention": False},
    "NTK factor 1, no proportional attention": {"ntk_factor": 1.0, "proportional_attention": False},
    "the model's own shift": {"shift": "own"},
}
ABLATIONS = {
    f"{name}: {what}": Cascade(row.method, row.windows, change)
    for name, row in CASCADES.items()
    for what, change in CHANGES.items()
    if not row.changed and (row.method == "sdedit" or "strength" not in change)
}
ALL_CASCADES = {**CASCADES, **ABLATIONS}


@contextlib.contextmanager
def windowed(pipe: Any, settings: Settings) -> Iterator[None]:
    """Inside the block the pipeline has windows, and the weights that were distilled for them if those are wanted.

    Raises:
        ValueError: no weights for this radius ship.
    """
    if settings.weights == OWN:
        flexclear.transform(pipe, r=settings.r)
        try:
            yield
        finally:
            flexclear.restore(pipe)
        return
    discs = {student.radius: student for student in read_students() if student.down_factor is None}
    if settings.r not in discs:
        raise ValueError(f"weights for r = {sorted(discs)} ship, not for {settings.r}; or --weights {OWN}")
    with as_student(pipe, discs[settings.r]):
        yield


def direct(
    pipe: Any,
    vocabulary: Vocabulary,
    requests: list[Request],
    pixels: int,
    row: str,
    settings: Settings,
    done: Callable,
) -> torch.Tensor:
    """Images ``[n, 3, pixels, pixels]``, 0 to 1, of a row of ``DIRECT``."""
    windows, ntk, proportional = DIRECT[row]
    with contextlib.ExitStack() as stack:
        if windows:
            stack.enter_context(windowed(pipe, settings))
            stack.enter_context(
                flexclear.override(
                    ntk_factor=settings.ntk_factor if ntk else 1.0,
                    proportional_attention=proportional,
                    training_tokens=(settings.native // TOKEN) ** 2 + TEXT,
                )
            )
        return generate(pipe, vocabulary, requests, settings.steps, pixels, 4, TEXT, done)


def cascaded(
    pipe: Any,
    vocabulary: Vocabulary,
    requests: list[Request],
    largest: int,
    row: Cascade,
    settings: Settings,
    done: Callable,
    base: torch.Tensor,
) -> tuple[dict[int, torch.Tensor], Stage]:
    """The same of an enlarged row, by side: the dense images ``base`` doubled until ``largest``.

    Nothing is set but what the row changes, and what the embedded model needs: the text length, and its native size. Also a
    stage, for the settings that it chose.
    """
    sizes = [2 * settings.native]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    backgrounds = list(vocabulary.backgrounds)
    drawn: list[tuple[torch.Tensor, ...]] = []
    with windowed(pipe, settings) if row.windows else contextlib.nullcontext():
        for request, picture in zip(requests, base, strict=True):
            cascade = upscale_cascade(
                pipe,
                caption(vocabulary.emoji[request.emoji].name, backgrounds[request.background]),
                sizes,
                method=row.method,
                image=as_picture(picture),
                seed=request.seed,
                max_sequence_length=TEXT,
                native=settings.native,
                **row.changed,
            )
            drawn.append(tuple(as_tensor(image) for image in cascade.images))
            done(len(sizes))
    return dict(zip(sizes, map(torch.stack, zip(*drawn, strict=True)), strict=True)), cascade.stages[-1]


def stage_settings(stage: Stage) -> str:
    """What the enlarging stages ran with, in words."""
    strength = "" if stage.strength is None else f"strength {stage.strength:g}, "
    proportional = ", proportional attention" if stage.proportional_attention else ""
    shift = "the model's own shift" if stage.shift is None else f"shift {stage.shift:g}"
    return f"({stage.steps} steps, {strength}{shift}, NTK factor {stage.ntk_factor:g}{proportional})"


def as_tensor(picture: Image.Image) -> torch.Tensor:
    """``[3, height, width]``, 0 to 1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255


def as_picture(picture: torch.Tensor) -> Image.Image:
    """Back."""
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())


class Gallery:
    """What the rows have drawn, a file a row and size, so that a row that is there is not drawn again.

    Args:
        folder: where; holds the results of one model and of one set of settings.
        pipe, vocabulary, requests, settings, sides: what is drawn, and how.
        done: called with the number of images after each few.

    Raises:
        ValueError: the folder is of other settings.
    """

    def __init__(
        self,
        folder: Path,
        pipe: Any,
        vocabulary: Vocabulary,
        requests: list[Request],
        settings: Settings,
        sides: list[int],
        done: Callable,
    ) -> None:
        self.folder, self.settings, self.sides = folder, settings, sides
        self._what: tuple[Any, Vocabulary, list[Request]] = (pipe, vocabulary, requests)
        self._done = done
        kept = {**asdict(settings), "sides": sides, "requests": [asdict(request) for request in requests]}
        kept |= {"teacher": teacher_fingerprint(), "students": students_fingerprint()}
        check_settings(folder / "settings.json", kept)

    def base(self) -> torch.Tensor:
        """Dense images at the native size."""
        settings = self.settings
        return self._kept("base", lambda: generate(*self._what, settings.steps, settings.native, 16, TEXT, self._done))

    def row(self, name: str) -> dict[int, torch.Tensor]:
        """Images of a row, by side."""
        if name in DIRECT:
            return {
                pixels: self._kept(
                    f"{name} {pixels}",
                    lambda pixels=pixels: direct(*self._what, pixels, name, self.settings, self._done),
                )
                for pixels in self.sides
            }
        files = {pixels: self._file(f"{name} {pixels}") for pixels in self.sides}
        if not all(file.is_file() for file in files.values()):
            row = ALL_CASCADES[name]
            drawn, stage = cascaded(*self._what, max(self.sides), row, self.settings, self._done, self.base())
            with whole_file(self._file(name).with_suffix(".txt")) as beside:
                beside.write_text(stage_settings(stage), encoding="utf-8")
            for pixels, file in files.items():
                self._keep(file, drawn[pixels])
        return {pixels: load_file(file)["pictures"] / 255 for pixels, file in files.items()}

    def measured(self, name: str, measure: Callable[[torch.Tensor], dict[str, Any]]) -> list[dict[str, Any]]:
        """The figures of a row, one entry a side."""
        file = self._file(name).with_suffix(".json")
        if not file.is_file():
            found = [{"pixels": side, "row": name, **measure(drawn)} for side, drawn in self.row(name).items()]
            with whole_file(file) as beside:
                beside.write_text(json.dumps(found), encoding="utf-8")
        read: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        return read

    def stage(self, name: str) -> str:
        """What a cascade's stages ran with, in words."""
        return self._file(name).with_suffix(".txt").read_text(encoding="utf-8")

    def _file(self, name: str) -> Path:
        return self.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.safetensors"

    def _keep(self, file: Path, pictures: torch.Tensor) -> None:
        with whole_file(file) as beside:
            save_file({"pictures": (pictures * 255).round().byte().contiguous()}, beside)

    def _kept(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        file = self._file(name)
        if not file.is_file():
            self._keep(file, make())
        return load_file(file)["pictures"] / 255
