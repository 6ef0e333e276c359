"""A cascade's folder: the image of every finished stage and a manifest, from which an interrupted cascade resumes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image

from flexclear.common.reading import parse_json, read_text
from flexclear.common.versions import versions
from flexclear.highres.stages import Stage
from flexclear.images.files import png_bytes, write_whole
from flexclear.images.folder_settings import differences
from flexclear.images.reading import read_own_png

MANIFEST = "cascade.json"
FORMAT = 1


class Folder:
    """The finished part of a cascade. Files are atomic; the manifest names an image only once it exists."""

    def __init__(self, path: str | Path, common: dict[str, Any], stages: list[Stage]) -> None:
        """Open a folder for a cascade; make it if it is missing.

        Args:
            path: the folder.
            common: what all stages share, in a form that JSON can hold.
            stages: those of the cascade. The ones finished in the folder must be the same; later ones may differ.

        Raises:
            ValueError: the folder holds another cascade, or images that would be replaced.
        """
        self.path = Path(path).expanduser()
        self.common: dict[str, Any] = json.loads(json.dumps(common))
        self.stages = stages
        self.done: list[dict[str, Any]] = []
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"folder {self.path} is a file")
        manifest = self.path / MANIFEST
        if manifest.is_file():
            self._read(manifest)
        else:
            for stage in stages:
                if self.file(stage).exists():
                    raise ValueError(
                        f"{self.file(stage)} exists, but no {MANIFEST} says where it is from; choose another folder"
                    )
        self.path.mkdir(parents=True, exist_ok=True)

    def file(self, stage: Stage) -> Path:
        """Path of a stage's image."""
        return self.path / f"stage_{stage.number}_{stage.height}x{stage.width}.png"

    def load(self, stage: Stage) -> Image.Image | None:
        """Load the image of a finished stage. None if there is none or its file was removed: then it is drawn again.

        Raises:
            ValueError: the file is not the one that the manifest was written for.
        """
        if stage.number > len(self.done):
            return None
        file = self.file(stage)
        if not file.is_file():
            del self.done[stage.number - 1 :]
            return None
        content = file.read_bytes()
        if _digest(content) != self.done[stage.number - 1]["sha256"]:
            raise ValueError(f"{file} was changed since its stage was finished; remove it to draw it again")
        return read_own_png(content, file).convert("RGB")

    def save(self, stage: Stage, picture: Image.Image) -> None:
        """Write a stage's image, then the manifest."""
        told = {"prompt": self.common["prompt"] or "", **stage.as_json(), "cascade": self.common["method"]}
        content = png_bytes(picture, told, versions())
        write_whole(self.file(stage), content, overwrite=True)
        self.done = [*self.done[: stage.number - 1], {"settings": _plain(stage), "sha256": _digest(content)}]
        text = json.dumps({"format": FORMAT, "common": self.common, "stages": self.done}, indent=1)
        write_whole(self.path / MANIFEST, f"{text}\n".encode(), overwrite=True)

    def _read(self, manifest: Path) -> None:
        try:
            found = parse_json(read_text(manifest))
            version, common, done = found["format"], dict(found["common"]), list(found["stages"])
            if not all(isinstance(stage["settings"], dict) and isinstance(stage["sha256"], str) for stage in done):
                raise TypeError("a stage has no settings or no digest")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{manifest} is not a cascade's manifest: {error}") from error
        if version != FORMAT:
            raise ValueError(
                f"{manifest} has format {version!r}, but this version reads {FORMAT}; choose another folder"
            )
        differing = differences(common, self.common)
        for stage, entry in zip(self.stages, done, strict=False):
            differing += [f"stage {stage.number}: {text}" for text in differences(entry["settings"], _plain(stage))]
        if differing:
            raise ValueError(
                f"{self.path} holds a cascade with other settings, which cannot be resumed as this one: {'; '.join(differing)}. "
                "Choose another folder, or remove that one"
            )
        self.done = done


def picture_digest(picture: Image.Image) -> str:
    """Hash of an image's size and pixels."""
    return _digest(repr(picture.size).encode() + picture.tobytes())


def _plain(stage: Stage) -> dict[str, Any]:
    return json.loads(json.dumps(stage.as_json()))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
