"""Input images: read before the weights, then scaled and cropped to the drawn size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from flexclear.generation.kinds import own_image, parameters_of
from flexclear.generation.settings import GenerateSettings
from flexclear.images.fitting import fitted, on_white
from flexclear.images.reading import image_size, read_image

Size = tuple[int, int]


def own_size(kind: Any, settings: GenerateSettings) -> Size | None:
    """(height, width) of the input image, if the pipeline draws at its size; None if it need not, or a size was requested.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an image.
    """
    given = [path for path in (settings.image, settings.control_image) if path is not None]
    if not given:
        return None
    sizes = [image_size(path.expanduser()) for path in given]
    if settings.sizes or settings.highres or own_image(kind) or "num_frames" in parameters_of(kind):
        return None
    width, height = sizes[0]
    return height, width


class Inputs:
    """What a call gets in addition to the prompt, for every size.

    Args:
        kind: the pipeline's class.
        settings: the requested settings.
        mode: the ControlNet's mode.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is not an image.
    """

    def __init__(self, kind: Any, settings: GenerateSettings, mode: int | None) -> None:
        self._kind, self._mode = kind, mode
        self._image, self._control = _read(settings.image), _read(settings.control_image)

    @property
    def image(self) -> Image.Image | None:
        """The given image, in RGB."""
        return self._image

    def arguments(self, size: Size | None, count: int) -> dict[str, Any]:
        """Make the arguments of a call for ``count`` images of a size; None: the pipeline's own.

        Raises:
            ValueError: an image is so narrow that it would be huge when scaled to the size.
        """
        has = parameters_of(self._kind)
        if size is None and isinstance(has.get("height"), int) and isinstance(has.get("width"), int):
            size = has["height"], has["width"]
        found: dict[str, Any] = {}
        if self._image is not None:
            image = self._image if own_image(self._kind) else _fit(self._image, size)
            found["image"] = image if count == 1 else [image] * count
        if self._control is not None:
            found["control_image"] = _fit(self._control, size)
        if self._mode is not None:
            found["control_mode"] = self._mode
        return found


def _read(path: Path | None) -> Image.Image | None:
    return None if path is None else on_white(read_image(path.expanduser()))


def _fit(picture: Image.Image, size: Size | None) -> Image.Image:
    return picture if size is None else fitted(picture, size, 1)
