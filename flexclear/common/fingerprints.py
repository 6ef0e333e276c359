"""Fingerprints of file contents, which tell apart models and weights files of the same name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from flexclear.common.reading import parse_json, read_text

PIECE = 1 << 16
PIECES = 8


def fingerprint_files(folder: Path, files: Iterable[Path]) -> str:
    """A fingerprint of some files in ``folder``: names, sizes and eight pieces of each, so that gigabytes need not be read.

    A model that was trained further or quantized differs in every piece.
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
    """A fingerprint of ``model_index.json`` and of all files of the components it names: configuration, tokenizers, weights.

    Raises:
        ValueError: ``model_index.json`` is damaged.
    """
    index = folder / "model_index.json"
    try:
        components = sorted(name for name, part in parse_json(read_text(index)).items() if isinstance(part, list))
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{index} is damaged: {error}") from error
    files = (file for name in components for file in sorted((folder / name).glob("*")))
    return fingerprint_files(folder, [index, *(file for file in files if counts(file))])


def counts(file: Path) -> bool:
    """Whether a file belongs to a model, that is, is neither hidden nor a README."""
    return file.is_file() and not file.name.startswith(".") and file.suffix != ".md"
