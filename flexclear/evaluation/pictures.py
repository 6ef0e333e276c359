"""Folders of images: which there are, which belong together, and their pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flexclear.common.reading import check_unicode, lines_of, parse_json, read_text
from flexclear.generation.parsing import read_prompts
from flexclear.images.files import read_settings
from flexclear.images.fitting import on_white
from flexclear.images.reading import image_size, read_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Folder:
    """The images of a folder and those below it.

    Attributes:
        path: the folder.
        files: by name: the path inside the folder without its ending, in the order of names.
    """

    path: Path
    files: Mapping[str, Path]

    def __len__(self) -> int:
        return len(self.files)


def read_folder(path: str | Path) -> Folder:
    """Find the images of a folder; files and folders whose names begin with a dot are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is a file, holds no image, or two that differ only in their ending.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no folder {path}")
    if not path.is_dir():
        raise ValueError(f"{path} must be a folder of images, but it is a file")
    files: dict[str, Path] = {}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if file.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in inside.parts):
            continue
        name = inside.with_suffix("").as_posix()
        if name in files:
            raise ValueError(
                f"{files[name]} and {file} differ only in their ending, so the name {name!r} does not identify a pair"
            )
        files[name] = file
    if not files:
        raise ValueError(f"{path} holds no images ({', '.join(SUFFIXES)})")
    return Folder(path, files)


def pair_names(a: Folder, b: Folder, common: bool = False) -> list[str]:
    """Names of the images that both folders have.

    Args:
        a, b: the folders.
        common: whether images without a partner may be left out.

    Raises:
        ValueError: there is no pair, or an image lacks its partner.
    """
    both = [name for name in a.files if name in b.files]
    alone = [(a, b, [n for n in a.files if n not in b.files]), (b, a, [n for n in b.files if n not in a.files])]
    if not both:
        raise ValueError(
            f"no image of {a.path} (such as {next(iter(a.files))!r}) has the name of one in {b.path} (such as "
            f"{next(iter(b.files))!r}). Pairs are made by file name"
        )
    for one, other, names in alone:
        if names and not common:
            raise ValueError(
                f"{len(names)} images of {one.path} have no partner in {other.path}, such as {names[0]!r}. Pairs are "
                "made by file name; common=True (--common) measures the "
                f"{len(both)} pairs that exist"
            )
    return both


def content_key(path: Path) -> str:
    """Names an image by what is in its file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def read_picture(path: Path, size: Size | None = None) -> Tensor:
    """An image as uint8 ``[3, height, width]``, transparent parts on white.

    Args:
        path: the file.
        size: scale to it by PIL's Lanczos filter, which averages where it shrinks; None: as it is.

    Raises:
        ValueError: the file is not an image, or has more pixels than Pillow accepts.
    """
    picture = on_white(read_image(path))
    if size is not None and picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def read_captions(file: str | Path | None, folder: Folder) -> dict[str, str]:
    """The prompt of every image, by its name.

    Args:
        file: ``.json``: an object of names (with or without ending) and prompts; ``.jsonl``: lines with ``file_name``
            and ``text``; any other: a text file with one prompt per line, in the order of the pictures' names. None: the
            images carry their prompts, as those of ``flexclear generate`` do.
        folder: the images.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not say what every image shows.
    """
    if file is None:
        found = {}
        for name, path in folder.files.items():
            try:
                found[name] = str(read_settings(path)["settings"]["prompt"])
            except (ValueError, KeyError, OSError) as error:
                raise ValueError(f"no prompts: --prompts FILE is missing, and {path} carries none") from error
        return found
    file = Path(file).expanduser()
    if file.suffix.lower() not in (".json", ".jsonl"):
        prompts = read_prompts(file)
        if len(prompts) != len(folder):
            raise ValueError(
                f"{file} has {len(prompts)} prompts for the {len(folder)} images of {folder.path}. Name them in a .json "
                "file, an object of image names and prompts, where they are not one each"
            )
        return dict(zip(folder.files, prompts, strict=True))
    if not file.is_file():
        raise FileNotFoundError(f"--prompts: no file {file}")
    named = _named_prompts(file)
    missing = [name for name in folder.files if name not in named]
    if missing:
        raise ValueError(f"{file} has no prompt for {len(missing)} images of {folder.path}, such as {missing[0]!r}")
    return {name: named[name] for name in folder.files}


def _named_prompts(file: Path) -> dict[str, str]:
    whole: dict[str, str] = {}
    try:
        text = read_text(file)
        if file.suffix.lower() == ".jsonl":
            lines = [parse_json(line) for line in lines_of(text) if line.strip()]
            found = [(line["file_name"], line["text"]) for line in lines]
        else:
            found = list(parse_json(text).items())
        for name, prompt in found:
            if not isinstance(prompt, str):
                raise TypeError(f"the prompt of {name!r} is not text")
            if _bare(name) in whole:
                raise ValueError(f"{_bare(name)!r} is named twice")
            whole[_bare(name)] = check_unicode(prompt, f"the prompt of {name!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} must hold names of images and their prompts: {error!r}") from error
    return whole


def _bare(name: str) -> str:
    path = Path(name)
    return path.with_suffix("").as_posix() if path.suffix.lower() in SUFFIXES else path.as_posix()


def batches(paths: Sequence[tuple[Path, ...]], size: Size | None, most: int) -> list[list[tuple[Path, ...]]]:
    """Groups of at most ``most`` rows of images whose sizes agree, in the order given."""
    groups: list[list[tuple[Path, ...]]] = []
    last: object = None
    for row in paths:
        sizes = size or tuple(image_size(path) for path in row)
        if not groups or sizes != last or len(groups[-1]) == most:
            groups.append([])
        groups[-1].append(row)
        last = sizes
    return groups
