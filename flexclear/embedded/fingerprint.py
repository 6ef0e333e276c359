"""Fingerprints that distinguish the embedded model from earlier ones, whose students and ControlNet do not fit it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from flexclear.common.shipped import model_directory


def teacher_fingerprint(folder: Path | None = None) -> str:
    """A fingerprint of the weights of the embedded model or a pipeline folder. It identifies a student's teacher.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    folder = model_directory() if folder is None else folder
    files = sorted(folder.glob("*/*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no weights in {folder}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:24]
