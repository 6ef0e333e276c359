"""What a benchmark ran on, and where its results go."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import flexclear
from flexclear.compile.tuned import device_name

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


def facts(device: torch.device, **others: Any) -> dict[str, Any]:
    """Hardware, versions, commit, date and settings of a run."""
    return {
        **origin(),
        "hardware": device_name(device),
        "torch": torch.__version__,
        "flexclear": flexclear.__version__,
        "python": platform.python_version(),
        **others,
    }


def origin() -> dict[str, str]:
    """Commit and date of this checkout now; empty outside of one. ``+``: with changes that are not committed."""
    if not (ROOT / ".git").exists():
        return {}
    found = _git("describe", "--always", "--abbrev=9", "--exclude=*", "--dirty=+")
    return {"commit": found, "date": datetime.date.today().isoformat()} if found else {}


def origin_of(file: Path) -> dict[str, str]:
    """Commit and date that a result says it was made at; else those of the commit that brought the file."""
    if file.suffix == ".json":
        about = json.loads(file.read_text(encoding="utf-8"))
        about = about.get("facts", {}) if isinstance(about, dict) else {}
        if "commit" in about:
            return {name: about[name] for name in ("commit", "date")}
    commit, _, date = _git("log", "-1", "--abbrev=9", "--format=%h %cs", "--", str(file)).partition(" ")
    return {"commit": commit, "date": date} if commit else {}


def _git(*arguments: str) -> str:
    """What git prints of this checkout; nothing where there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def write_results(
    name: str, about: dict[str, Any], rows: list[dict[str, Any]], table: str, out: Path = RESULTS
) -> None:
    """Write ``<name>.json`` and ``<name>.md``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({"facts": about, "rows": rows}, indent=1) + "\n")
    head = ", ".join(f"{key} {value}" for key, value in about.items())
    (out / f"{name}.md").write_text(f"{head}\n\n{table}")
