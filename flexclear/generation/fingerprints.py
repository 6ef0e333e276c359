"""Fingerprints of the contents of files that images depend on."""

from __future__ import annotations

from pathlib import Path

from flexclear.common.fingerprints import counts, fingerprint_files, fingerprint_pipeline
from flexclear.generation.settings import GenerateSettings


def fingerprints_of(settings: GenerateSettings, folder: str, weights: Path | None, controlnet: str) -> tuple[str, ...]:
    """Fingerprint the model's files, if it is a folder, and the other files that images depend on.

    Args:
        settings: the requested settings.
        folder: the pipeline's folder or hub id.
        weights: the weights file, or None.
        controlnet: the ControlNet's folder or hub id; empty: none.

    Raises:
        OSError: a file cannot be read.
        ValueError: the pipeline's ``model_index.json`` is damaged.
    """
    found = [fingerprint_pipeline(Path(folder))] if Path(folder).is_dir() else []
    files = [weights, settings.image, settings.control_image, *(path for path, _ in settings.loras)]
    for file in (file.expanduser() for file in files if file is not None):
        found.append(fingerprint_files(file.parent, [file]))
    if (place := Path(controlnet)).is_dir() and controlnet:
        found.append(fingerprint_files(place, sorted(file for file in place.glob("*") if counts(file))))
    return tuple(found)
