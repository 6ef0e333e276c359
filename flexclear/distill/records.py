"""The files in a run's folder, and the records of its losses."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from flexclear.common.reading import lines_of
from flexclear.compile.files import whole_file, write_errors

WEIGHTS = "weights.safetensors"
LOSSES = "losses.jsonl"
HELD_OUT = "held_out.jsonl"
LORA = "lora"
SHEETS = "sheets"

Record = dict[str, float]


def append(path: Path, record: Record) -> None:
    """Add a record to a file of them.

    Raises:
        OSError: the file cannot be written, for example on a full disk.
    """
    with write_errors(path), path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def cut(path: Path, step: int) -> None:
    """Keep only the records up to ``step``; drop a half-written last line too. No effect without the file."""
    if not path.is_file():
        return
    kept = []
    for line in lines_of(path.read_text(encoding="utf-8", errors="replace")):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    with whole_file(path) as beside:
        beside.write_text("".join(kept), encoding="utf-8")
