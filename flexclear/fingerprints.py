"""What tells models and weights files apart whose names are equal: their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

PIECE = 1 << 16
PIECES = 8


def fingerprint_files(folder: Path, files: Iterable[Path]) -> str:
    """Of some files' names in ``folder``, their sizes and eight pieces of each, so that gigabytes need not be read.

    A model that was trained further or quantised differs in every piece.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}:{size};".encode())
        with file.open("rb") as stream:
            for step in range(PIECES):
                stream.seek(max(0, size - PIECE) * step // (PIECES - 1))
                digest.update(stream.read(PIECE))
    return digest.hexdigest()[:24]


def fingerprint_pipeline(folder: Path) -> str:
    """Of all files of a pipeline folder that ``save_pretrained`` writes: configurations, tokenizers, weights."""
    parts = sorted([*folder.glob("*"), *folder.glob("*/*")])
    return fingerprint_files(folder, (part for part in parts if counts(part)))


def counts(file: Path) -> bool:
    """Whether a file is of a model: no hidden file, no README."""
    return file.is_file() and not file.name.startswith(".") and file.suffix != ".md"
