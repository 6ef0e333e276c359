"""Images that other programs wrote: whatever is wrong with a file is one ``ValueError`` that names it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngImageFile


def read_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """A decoded image, in the mode that the file has.

    Args:
        source: a file, or what is in one.
        name: for the message; the path by default.

    Raises:
        MemoryError: it has more pixels than fit into memory.
        OSError: the file cannot be read.
        ValueError: it is no image, is damaged, or has more pixels than Pillow takes.
    """
    with _decoding(source if name is None else name), Image.open(_stream(source)) as opened:
        opened.load()
        return opened


def read_own_png(content: bytes, name: object) -> Image.Image:
    """A PNG that is known to be our own, by its digest: it may have any number of pixels.

    Raises:
        ValueError: it is damaged.
    """
    # Pillow's limit on pixels is that of Image.open.
    with _decoding(name), PngImageFile(io.BytesIO(content)) as opened:
        opened.load()
        return opened


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image, whose pixels are not decoded.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no image, or has more pixels than Pillow takes.
    """
    with _decoding(path), Image.open(path) as opened:
        return opened.size


def png_text(path: Path, chunk: str) -> str | None:
    """A text chunk of a PNG that comes before the pixels, which are not decoded; None if there is none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no PNG or is damaged.
    """
    with _decoding(path), path.open("rb") as stream, PngImageFile(stream) as opened:
        text = opened.info.get(chunk)
    return text if isinstance(text, str) else None


def _stream(source: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


@contextlib.contextmanager
def _decoding(name: object) -> Iterator[None]:
    # Pillow's decoders raise whatever a damaged file leads them to: struct.error, zlib.error, IndexError, ...
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"{name} has more pixels than fit into memory") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be read as an image: {cause}") from error
