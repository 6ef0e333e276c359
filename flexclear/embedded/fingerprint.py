"""Fingerprints that distinguish the embedded model and its students from earlier ones, whose results are not theirs."""

from __future__ import annotations

import hashlib
from pathlib import Path

from flexclear.common.shipped import model_directory, students_directory


def teacher_fingerprint(folder: Path | None = None) -> str:
    """A fingerprint of the weights of the embedded model or a pipeline folder. It identifies a student's teacher.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    return _of_weights(model_directory() if folder is None else folder, "*/*.safetensors")


def students_fingerprint(folder: Path | None = None) -> str:
    """A fingerprint of the students' weights in a folder, by default the package's.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    return _of_weights(students_directory() if folder is None else folder, "*.safetensors")


def _of_weights(folder: Path, pattern: str) -> str:
    files = sorted(folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no weights in {folder}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:24]
