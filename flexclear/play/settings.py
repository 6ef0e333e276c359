"""What ``flexclear play`` is asked for, checked before a weight is read."""

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
"""Arguments of pipelines that draw from an image, even where the image itself has a default."""


@dataclass(frozen=True)
class PlaySettings:
    """What is drawn with, and what the page offers.

    Attributes:
        model: a local pipeline folder, a hub id whose files are in the cache, or ``"embedded"``.
        sizes: (height, width) in pixels; empty: some around the pipeline's own.
        r: window radius in tokens that the page begins with; None: the first weights', or else 16.
        weights: files that the page offers, each as ``GenerateSettings.weights`` has it.
        steps, text_len: of ``GenerateSettings``.
        dtype, device, backend: of ``GenerateSettings``.
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
        """What ``flexclear generate`` is asked for to draw the same, dense; prompt and place of the images do not matter."""
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
        label: what the page calls them.
        path: the file; None: those of the pipeline.
        radius, down_factor: of the window that they were trained for, None where the file says none.
        stated: whether the file says its window.
    """

    label: str
    path: Path | None = None
    radius: int | None = None
    down_factor: int | None = None
    stated: bool = False


PLAIN = Weights("the model's own")


@dataclass(frozen=True)
class Ready:
    """What ``check_play`` has found out."""

    settings: PlaySettings
    setup: Setup
    weights: tuple[Weights, ...]


def check_play(settings: PlaySettings) -> Ready:
    """Everything that can be known before weights are read; nothing is asked of the network.

    Raises:
        FileNotFoundError: there is no such model or weights file on this machine.
        TypeError, ValueError: a setting makes no sense, or does not go with the model or the device, or the pipeline draws
            videos, or from images.
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
    """The pipeline, dense, where it runs.

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
    """A folder for a hub id, from the cache of huggingface_hub.

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
    """Raise for a pipeline that takes more than a prompt.

    Raises:
        TypeError: it does.
    """
    import diffusers

    with loading(model):
        name = str(diffusers.DiffusionPipeline.load_config(model_folder(model)).get("_class_name"))
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise TypeError(f"{model} is a {name}, which is no pipeline of diffusers, so nobody knows what it takes")
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
