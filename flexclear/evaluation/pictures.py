"""Folders of images: finding, pairing and reading them."""

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
    """The images of a folder and its subfolders.

    Attributes:
        path: the folder.
        files: files by name, which is the path inside the folder without its suffix; sorted by name.
    """

    path: Path
    files: Mapping[str, Path]

    def __len__(self) -> int:
        return len(self.files)


def read_folder(path: str | Path) -> Folder:
    """Find the images of a folder. Files and folders whose names begin with a dot are skipped.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is a file, holds no images, or holds two that differ only in their suffix.
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
        common: whether to ignore images without a partner.

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
    """A name for an image derived from its file's contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def read_picture(path: Path, size: Size | None = None) -> Tensor:
    """Read an image as uint8 ``[3, height, width]``, with transparent parts on white.

    Args:
        path: the file.
        size: scale to it with PIL's Lanczos filter, which averages when it shrinks; None: unscaled.

    Raises:
        ValueError: the file is not an image, or has more pixels than Pillow accepts.
    """
    picture = on_white(read_image(path))
    if size is not None and picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def read_captions(file: str | Path | None, folder: Folder) -> dict[str, str]:
    """Read the prompts by image name.

    Args:
        file: ``.json``: an object of names (with or without suffix) and prompts; ``.jsonl``: lines with ``file_name`` and
            ``text``; any other: a text file with one prompt per line, in the order of the images' names. None: the images
            contain their prompts, as those of ``flexclear generate`` do.
        folder: the images.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not have a prompt for every image.
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
    """Group rows of images of equal size into batches of at most ``most``, in the given order."""
    groups: list[list[tuple[Path, ...]]] = []
    last: object = None
    for row in paths:
        sizes = size or tuple(image_size(path) for path in row)
        if not groups or sizes != last or len(groups[-1]) == most:
            groups.append([])
        groups[-1].append(row)
        last = sizes
    return groups
