"""Atomic training checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` so that a reader finds either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: nothing was saved at ``path`` yet.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: run the earlier training step first")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
