"""Finds a weights file and reads its header, without reading tensors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flexclear.common.choices import EMBEDDED, HUB_ID
from flexclear.common.shipped import students_directory

SUFFIX = ".safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Element types in which weights may be stored."""


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        path: the file.
        name: the file's name, or the requested name for a file from the hub.
        metadata: the header's free-form metadata.
        shapes, dtypes: those of each tensor, by key.
    """

    path: Path
    name: str
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]


def locate(
    path: str | Path,
    filename: str | None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Find the file: ``path``, or ``filename`` inside the folder or hub repository ``path``.

    If ``path`` is ``"embedded"`` and no such folder exists here, it means the embedded model's distilled weights.

    Raises:
        TypeError: ``path`` is not a path.
        FileNotFoundError: there is no such file; the message lists similar ones.
        IsADirectoryError: it is a folder, and no file was named.
        huggingface_hub.errors: the hub does not have it or cannot be reached.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"path must be a str or Path of a {SUFFIX} file, or a hub id, got {type(path).__name__}")
    place = Path(path).expanduser()
    if path == EMBEDDED and filename is not None and not place.exists():
        place = students_directory()
    if filename is not None and not place.is_dir():
        if place.is_file():
            raise ValueError(f"{place} is a file already; leave filename={filename!r} out")
        if not isinstance(path, str) or not HUB_ID.fullmatch(path):
            raise FileNotFoundError(f"{path} is neither a folder here nor a hub id such as 'owner/name'")
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                repo_id=path,
                filename=filename,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
        )
    file = place if filename is None else place / filename
    if file.is_dir():
        inside = _weights_in(file)
        raise IsADirectoryError(f"{file} is a folder; name the file in it with filename=..., {_listed(inside)}")
    if not file.is_file():
        hub = f". If {path!r} is a hub id, name the file in it with filename=..." if _may_be_hub(path) else ""
        raise FileNotFoundError(
            f"no file {file}; in {file.parent}: {_listed(_weights_in(file.parent), file.name)}{hub}"
        )
    return file


def read_header(path: Path, name: str) -> Header:
    """Read the header of a safetensors file.

    Raises:
        ValueError: the file is a pickle, a Git LFS pointer, truncated or damaged.
    """
    with path.open("rb") as stream:
        head = stream.read(64)
    if is_pickle(head):
        raise ValueError(
            f"{path} is a pickle (what torch.save writes), which can run any code when it is read. flexclear reads "
            "safetensors only: get the file in that format, or convert one that you trust with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')"
        )
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: git lfs pull, or download it again")
    try:
        with safe_open(path, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
            return Header(
                path=path,
                name=name,
                metadata=tensors.metadata() or {},
                shapes={key: tuple(part.get_shape()) for key, part in slices.items()},
                dtypes={key: str(part.get_dtype()) for key, part in slices.items()},
            )
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is not a complete safetensors file, perhaps truncated or damaged: {error}. Download it again"
        ) from error


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a zipped or bare pickle, as written by ``torch.save``."""
    zipped = head[:4] in (b"PK\x03\x04", b"PK\x05\x06")
    # A safetensors file may begin with the same two bytes, its header's length. But the header itself begins with a brace.
    return zipped or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[8:9] != b"{")


def _may_be_hub(path: str | Path) -> bool:
    return isinstance(path, str) and HUB_ID.fullmatch(path) is not None and not path.endswith(SUFFIX)


def _weights_in(folder: Path) -> list[str]:
    return sorted(found.name for found in folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []


def _listed(names: list[str], wanted: str = "") -> str:
    close = difflib.get_close_matches(wanted, names, n=5, cutoff=0.3) or names[:5]
    return f"one of {close}" if close else f"no {SUFFIX} file"
