"""What a benchmark ran on, and where its results go."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

import flexclear

RESULTS = Path(__file__).parent / "results"


def hardware(device: torch.device) -> str:
    """Name of the device and, on CPU, the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def facts(device: torch.device, **others: Any) -> dict[str, Any]:
    """Hardware, versions and settings of a run."""
    return {
        "hardware": hardware(device),
        "torch": torch.__version__,
        "flexclear": flexclear.__version__,
        "python": platform.python_version(),
        **others,
    }


def write_results(
    name: str, about: dict[str, Any], rows: list[dict[str, Any]], table: str, out: Path = RESULTS
) -> None:
    """Write ``<name>.json`` and ``<name>.md``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({"facts": about, "rows": rows}, indent=1) + "\n")
    head = ", ".join(f"{key} {value}" for key, value in about.items())
    (out / f"{name}.md").write_text(f"{head}\n\n{table}")
