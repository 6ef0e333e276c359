"""Lets a benchmark resume where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexclear.compile.files import whole_file


def check_settings(file: Path, now: dict[str, Any]) -> None:
    """Write what a folder's results depend on, or compare it with what was written when they were begun.

    Args:
        file: JSON in the folder of the results.
        now: the settings of this run.

    Raises:
        ValueError: they were begun with others; the message names them.
    """
    if not file.is_file():
        with whole_file(file) as beside:
            beside.write_text(json.dumps(now, indent=1), encoding="utf-8")
        return
    then = json.loads(file.read_text(encoding="utf-8"))
    differing = [f"{k}: {then.get(k)} then, {now.get(k)} now" for k in {**then, **now} if then.get(k) != now.get(k)]
    if differing:
        raise ValueError(
            f"{file.parent} was begun with other settings ({'; '.join(differing)}). Name another --folder, or delete it"
        )
