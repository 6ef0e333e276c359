"""Settings of ``flexclear play``, checked before any weights are read."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexclear.common.choices import EMBEDDED
from flexclear.generation.check import Setup, check, check_sizes, loading, weights_file
from flexclear.generation.kinds import load_pipeline, needs_image, parameters_of
from flexclear.generation.settings import DENSE, GenerateSettings, model_folder
from flexclear.masks import Disc, Downsampled
from flexclear.weights import metadata
from flexclear.weights.files import read_header

OF_IMAGES = ("control_image", "mask_image", "strength")
"""Arguments of pipelines that draw from an image, even if the image itself has a default."""


@dataclass(frozen=True)
class PlaySettings:
    """What to draw with, and what the page offers.

    Attributes:
        model: a local pipeline folder, a hub id whose files are in the cache, or ``"embedded"``.
        sizes: (height, width) in pixels; empty: some around the pipeline's own.
        r: initial window radius in tokens; None: the first weights', or else 16.
        weights: files that the page offers, each in the form of ``GenerateSettings.weights``.
        steps, text_len: as in ``GenerateSettings``.
        dtype, device, backend: as in ``GenerateSettings``.
    """

    model: str = EMBEDDED
    sizes: tuple[tuple[int, int], ...] = ()
    r: int | None = None
    weights: tuple[str, ...] = ()
    steps: int | None = None
    text_len: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"

    def as_generate(self) -> GenerateSettings:
        """Settings for ``flexclear generate`` to draw the same, dense. Prompt and output path do not matter."""
        return GenerateSettings(
            model=self.model,
            prompts=("-",),
            out=Path(tempfile.gettempdir()),
            sizes=self.sizes,
            r=DENSE,
            steps=self.steps,
            text_len=self.text_len,
            dtype=self.dtype,
            device=self.device,
            backend=self.backend,
        )


@dataclass(frozen=True)
class Weights:
    """Weights that a window can be drawn with.

    Attributes:
        label: name on the page.
        path: the file; None: the pipeline's own weights.
        radius, down_factor: those of the window that they were trained for; None if the file names none.
        stated: whether the file names its window.
    """

    label: str
    path: Path | None = None
    radius: int | None = None
    down_factor: int | None = None
    stated: bool = False


PLAIN = Weights("the model's own")


@dataclass(frozen=True)
class Ready:
    """What ``check_play`` found out."""

    settings: PlaySettings
    setup: Setup
    weights: tuple[Weights, ...]


def check_play(settings: PlaySettings) -> Ready:
    """Check everything that can be known before weights are read, without using the network.

    Raises:
        FileNotFoundError: there is no such model or weights file on this machine.
        TypeError, ValueError: a setting is invalid, or does not fit the model or the device, or the pipeline draws videos, or
            draws from images.
    """
    settings.as_generate().check()
    settings = replace(settings, model=_on_this_machine(settings.model))
    _check_draws_from_text(settings.model)
    setup = check(settings.as_generate())
    weights = [_weights(text) for text in settings.weights]
    if settings.model == EMBEDDED:
        from flexclear.embedded.students import read_students

        weights = [*map(_of_student, read_students()), *weights]
    labels = [choice.label for choice in weights]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"--weights: two files would be called {twice!r} on the page; give each once")
    return Ready(settings, setup, (PLAIN, *weights))


def load_play(ready: Ready) -> Any:
    """Load the pipeline, dense, onto its device.

    Raises:
        OSError: it cannot be loaded.
        ValueError: it does not draw one of the sizes.
    """
    asked = ready.settings.as_generate()
    with loading(ready.settings.model):
        pipe = load_pipeline(ready.setup.kind, asked, ready.setup.folder, "", ready.setup.dtype)
    check_sizes(pipe, asked)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(ready.setup.device)
    return pipe


def _on_this_machine(model: str) -> str:
    """Folder of a hub id in the cache of huggingface_hub.

    Raises:
        FileNotFoundError: it is not there.
    """
    folder = model_folder(model)
    if model == EMBEDDED or Path(folder).is_dir():
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(model, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{model} is no folder, and is not in the cache of huggingface_hub; flexclear play downloads nothing: "
            f"hf download {model}"
        ) from error


def _check_draws_from_text(model: str) -> None:
    """Raise for a pipeline that needs more than a prompt.

    Raises:
        TypeError: it does.
    """
    import diffusers

    with loading(model):
        name = str(diffusers.DiffusionPipeline.load_config(model_folder(model)).get("_class_name"))
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise TypeError(f"{model} is a {name}, which is not a diffusers pipeline, so its arguments are unknown")
    has = parameters_of(kind)
    if needs_image(name, has) or not has.keys().isdisjoint(OF_IMAGES):
        raise TypeError(f"{model} ({name}) draws from an image, and flexclear play from a prompt alone")


def _weights(text: str) -> Weights:
    path = weights_file(text)
    found = metadata.read(read_header(path, path.name)).windows
    inner = found.window if isinstance(found, Downsampled) else found
    return Weights(
        label=path.name,
        path=path,
        radius=inner.radius if isinstance(inner, Disc) else None,
        down_factor=found.factor if isinstance(found, Downsampled) else None,
        stated=found is not None,
    )


def _of_student(student: Any) -> Weights:
    pooled = "" if student.down_factor is None else f" + pooled {student.down_factor} x {student.down_factor}"
    label = f"distilled for r = {student.radius}{pooled}"
    return Weights(label, student.path, student.radius, student.down_factor, stated=True)
