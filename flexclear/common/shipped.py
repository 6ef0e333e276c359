"""Folders that ship with the package: the embedded model, its students, its ControlNet."""

from __future__ import annotations

from pathlib import Path

_EMBEDDED = Path(__file__).resolve().parents[1] / "embedded"


def model_directory() -> Path:
    """Return the folder of the embedded model, a diffusers pipeline folder."""
    return _EMBEDDED / "model"


def students_directory() -> Path:
    """The folder of the students that ship with the package; missing if none do."""
    return _EMBEDDED / "students"


def controlnet_directory() -> Path:
    """Return the folder of the ControlNet that ships with the package, a diffusers model folder."""
    return _EMBEDDED / "controlnet_model"
