"""Reads images that other programs wrote. Any fault in a file becomes one ``ValueError`` that names the file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngImageFile

from flexclear.common.extras import require


def read_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """Decode an image, in the file's own mode.

    Args:
        source: a file, or the contents of one.
        name: name for the message; by default the path.

    Raises:
        MemoryError: it has more pixels than fit into memory.
        OSError: the file cannot be read.
        ValueError: it is not an image, is damaged, or has more pixels than Pillow accepts.
    """
    with _decoding(source if name is None else name), Image.open(_stream(source)) as opened:
        told = _says_more(opened)
        opened.load()
        turn = _TURNS.get(_orientation(opened)) if told else None
        return opened if turn is None else opened.transpose(turn)


def read_own_png(content: bytes, name: object) -> Image.Image:
    """Decode a PNG that its digest shows to be our own, so that it may have any number of pixels.

    Raises:
        ValueError: it is damaged.
    """
    # Pillow's limit on pixels applies only to Image.open.
    with _decoding(name), PngImageFile(io.BytesIO(content)) as opened:
        opened.load()
        return opened


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image, without decoding its pixels.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an image, or has more pixels than Pillow accepts.
    """
    with _decoding(path), Image.open(path) as opened:
        if opened.format == "TIFF":  # which Pillow may turn by itself
            opened.load()
        on_its_side = _says_more(opened) and _orientation(opened) in (5, 6, 7, 8)
        return opened.size[::-1] if on_its_side else opened.size


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by EXIF's orientation."""


def _says_more(opened: Image.Image) -> bool:
    """Whether an image that is not decoded yet may have an orientation; one that a PNG names after its pixels does not count."""
    return opened.format == "TIFF" or any(key.lower().endswith(("exif", "xmp")) for key in map(str, opened.info))


def _orientation(opened: Image.Image) -> int:
    """EXIF's orientation, 1 where there is none or it is damaged."""
    try:
        return int(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def png_text(path: Path, chunk: str) -> str | None:
    """A text chunk before the pixels of a PNG, without decoding these; None if there is none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a PNG or is damaged.
    """
    with _decoding(path), path.open("rb") as stream, PngImageFile(stream) as opened:
        text = opened.info.get(chunk)
    return text if isinstance(text, str) else None


def gif_comment(path: Path) -> str | None:
    """The comment before the pixels of a GIF, without decoding these; None if there is none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a GIF or is damaged.
    """
    with _decoding(path), path.open("rb") as stream, GifImageFile(stream) as opened:
        text = opened.info.get("comment")
        return text.decode("utf-8") if isinstance(text, bytes) else None


def mp4_comment(path: Path) -> str | None:
    """The comment of an MP4 file, without decoding frames; None if there is none.

    Raises:
        ImportError: PyAV is not installed.
        OSError: the file cannot be read.
        ValueError: it is not an MP4 or is damaged.
    """
    require("av", f"reading {path}")
    import av

    with path.open("rb") as stream:
        try:
            with av.open(stream, format="mp4") as container:
                return container.metadata.get("comment")
        except av.error.FFmpegError as error:
            raise ValueError(f"{path} cannot be read as a video: {error.strerror}") from error


def _stream(source: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


@contextlib.contextmanager
def _decoding(name: object) -> Iterator[None]:
    # On a damaged file, Pillow's decoders may raise anything: struct.error, zlib.error, IndexError, ...
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"{name} has more pixels than fit into memory") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        cause = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # it contains a stream's address, which differs from run to run
            cause = "it is of no known format"
        raise ValueError(f"{name} cannot be read as an image: {cause}") from error
