"""Shared by the GPU benchmarks: a clock with a limit, and rows that are on disk as soon as they are measured."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.machine import facts


class Clock:
    """Seconds since it was made, and whether a limit has passed."""

    def __init__(self, limit: float) -> None:
        self.limit, self._start = limit, time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self._start

    @property
    def over(self) -> bool:
        return self.spent > self.limit


class Rows:
    """JSON lines; each says its stage, and the first of a process on what it ran."""

    def __init__(self, path: Path, stage: str, device: torch.device) -> None:
        self._path, self._stage = path, stage
        path.parent.mkdir(parents=True, exist_ok=True)
        about = facts(device)
        if device.type == "cuda":
            about["cuda"] = torch.version.cuda
            about["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        self.add({"facts": about})

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": self._stage, **row}) + "\n")
