"""Images and videos on disk that contain their settings: text chunks, file names, and protection from overwriting."""

from __future__ import annotations

import io
import json
import re
import tempfile
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flexclear.common.reading import parse_json
from flexclear.compile.files import whole_file, whole_folder
from flexclear.images.reading import gif_comment, mp4_comment, png_text

CHUNK = "flexclear"
"""Name of the text chunk that holds settings and versions in JSON."""

READABLE_CHUNK = "parameters"
"""Name of the text chunk with the same in readable form, which other programs also write and show."""

SUFFIXES = (".png", ".gif", ".mp4")
"""Suffixes of files that contain settings: an image's, and videos'."""

FRAME = "frame_{:04d}.png"
"""Name of a frame, counted from 1, of a video that is a folder of frames."""

OTHER_FORMATS = (
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".jxl",
    ".webm",
    ".mov",
    ".mkv",
    ".avi",
)

SLUG_LENGTH = 48


def slug(prompt: str) -> str:
    """A prompt as part of a file name: lower-case letters and digits of any script, joined by hyphens, truncated at a word."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt).lower())
    text = ""
    for word in words:
        if len(text) + len(word) >= SLUG_LENGTH:
            break
        text += f"-{word}" if text else word
    return text or "".join(words)[: SLUG_LENGTH // 2] or "picture"


def settings_text(settings: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The text in a file that ``read_settings`` reads, in ASCII."""
    return json.dumps({"settings": dict(settings), "versions": dict(versions)})


def png_bytes(picture: Image.Image, settings: Mapping[str, Any], versions: Mapping[str, str]) -> bytes:
    """Encode an image as PNG with its settings, including ``prompt``, in text chunks. Equal arguments give equal bytes."""
    info = PngInfo()
    info.add_text(CHUNK, settings_text(settings, versions))
    rest = {name: value for name, value in settings.items() if name != "prompt" and value is not None}
    lines = [
        str(settings["prompt"]),
        ", ".join(f"{name}: {value}" for name, value in rest.items()),
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    info.add_text(READABLE_CHUNK, "\n".join(lines))
    stream = io.BytesIO()
    picture.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read ``{"settings": ..., "versions": ...}`` from a PNG, GIF or MP4 that flexclear wrote, or a folder of video frames.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: it is an MP4, and PyAV is not installed.
        ValueError: it is of another kind, is damaged, or contains no settings of flexclear.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".gif":
        text, where = gif_comment(path), "comment"
    elif kind == ".mp4":
        text, where = mp4_comment(path), "comment"
    else:
        path = path / FRAME.format(1) if path.is_dir() else path
        text, where = png_text(path, CHUNK), f"text chunk {CHUNK!r}"
    if text is None:
        raise ValueError(f"{path} has no {where}: flexclear generate did not write it")
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} has a damaged {where}: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise ValueError(f"{path} has a {where} without settings")
    return found


@dataclass(frozen=True)
class Target:
    """Where images or videos go.

    Attributes:
        path: a folder, or a file for one image.
        is_file: which of the two.
        overwrite: replace existing files. Without it, numbers in a folder continue from its highest one, and an existing file
            is an error.
        first: number of a resumed set's first image in its folder; None if no set is resumed.
        suffix: suffix of each file in the folder; empty: each is a folder of frames.
    """

    path: Path
    is_file: bool
    overwrite: bool
    first: int | None = None
    suffix: str = ".png"

    @classmethod
    def of(cls, out: Path, pictures: int, overwrite: bool, resume: bool = False, suffix: str = ".png") -> Target:
        """The target that ``out`` names: a file if it ends in ``suffix`` and is not a folder; else a folder, made if missing.

        ``resume`` permits an existing file; ``flexclear.generation.resuming`` compares it with what was requested.

        Raises:
            ValueError: ``out`` cannot be written, is a file of another kind, exists, or is a file for several images.
        """
        out = out.expanduser()
        kind = out.suffix.lower()
        is_file = not out.is_dir() and bool(kind) and kind == suffix
        if not out.is_dir() and not is_file and kind in (*SUFFIXES, *OTHER_FORMATS):
            named = (
                f"end in {suffix}, the format that carries the settings," if suffix == ".png" else f"end in {suffix},"
            )
            raise ValueError(f"--out must {named if suffix else 'not be a file,'} or be a folder; got {out}")
        if is_file and pictures > 1:
            raise ValueError(f"--out names one file, {out}, for {pictures} images; name a folder")
        if is_file and out.exists() and not overwrite and not resume:
            raise ValueError(f"--out {out} exists already; --overwrite replaces it")
        folder = out.parent if is_file else out
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error.strerror or error}") from error
        return cls(out, is_file, overwrite, suffix=suffix)

    def write(self, number: int, prompt: str, content: bytes | Mapping[str, bytes]) -> Path:
        """Write image ``number`` of a run, counted from 1, atomically. Return its path.

        Args:
            number: number of the image.
            prompt: prompt for the file name.
            content: contents of the file, or of the files of a folder by name.

        Raises:
            FileExistsError: another process has written the file ``path`` since.
        """
        if self.is_file:
            return write_whole(self.path, content, self.overwrite)
        if self.overwrite:
            return write_whole(self._named(number, prompt), content, True)
        taken = {number for number, _ in numbered(self.path)}
        place = 0 if self.first is None else self.first + number - 1
        if self.first is None or place in taken:
            place = max(taken, default=0) + 1
        while True:
            try:
                return write_whole(self._named(place, prompt), content, False)
            except FileExistsError:  # Another process has taken the name since.
                place = max([place, *(number for number, _ in numbered(self.path))]) + 1

    def _named(self, number: int, prompt: str) -> Path:
        return self.path / f"{number:04d}_{slug(prompt)}{self.suffix}"


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """Number and path of the images and videos of ``flexclear generate`` in a folder, sorted by number."""
    ours = (entry for entry in folder.iterdir() if entry.suffix in SUFFIXES or (entry / FRAME.format(1)).is_file())
    found = ((re.match(r"(\d+)_", entry.name), entry) for entry in ours)
    return sorted((int(match[1]), entry) for match, entry in found if match)


def write_whole(path: Path, content: bytes | Mapping[str, bytes], overwrite: bool) -> Path:
    """Write a file, or a folder of files by name, atomically. Without ``overwrite``, raise FileExistsError if it exists."""
    if isinstance(content, Mapping):
        with whole_folder(path, overwrite) as beside:
            for name, part in content.items():
                (beside / name).write_bytes(part)
        return path
    with whole_file(path, overwrite) as beside:
        beside.write_bytes(content)
    return path
