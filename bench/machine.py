"""What a benchmark ran on, and where its results go."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

import flexclear
from flexclear.compile.tuned import device_name

RESULTS = Path(__file__).parent / "results"


def facts(device: torch.device, **others: Any) -> dict[str, Any]:
    """Hardware, versions and settings of a run."""
    return {
        "hardware": device_name(device),
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
