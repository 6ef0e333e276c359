"""How shards, radii, LoRA and prompt files of ``flexclear generate`` are written."""

from __future__ import annotations

import math
import re
from pathlib import Path

from flexclear.common.reading import lines_of, read_text
from flexclear.generation.settings import DENSE


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) from ``"i/n"``: the i-th of n parts, counted from 0.

    Raises:
        ValueError: it is not a shard.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    if match is None:
        raise ValueError(f"--shard is I/N, such as 0/4; got {text!r}")
    return int(match[1]), int(match[2])


def parse_radius(text: str) -> int | str:
    """Return the radius, or ``"dense"``.

    Raises:
        ValueError: it is neither.
    """
    if text == DENSE:
        return text
    if re.fullmatch(r"\d{1,9}", text.strip()) is None or int(text) < 1:
        raise ValueError(f"--r is a window radius of 1 or more tokens, or {DENSE!r} for the plain model; got {text!r}")
    return int(text)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read one prompt per line of a UTF-8 file. Blank lines and lines that begin with ``#`` are skipped.

    Lines end at newlines only: a prompt may hold U+2028 or U+0085.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, is not UTF-8 text, or holds no prompt.
    """
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(f"--prompts must be a text file, {path} is a folder")
    if not path.exists():
        raise FileNotFoundError(f"--prompts: no file {path}")
    try:
        lines = [line.strip() for line in lines_of(read_text(path))]
    except ValueError as error:
        raise ValueError(f"--prompts must be a UTF-8 text file: {error}") from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise ValueError(f"--prompts {path} holds no prompt, only blank lines and # comments")
    return prompts


def parse_lora(text: str) -> tuple[Path, float]:
    """(file, scale) from ``"FILE"`` or ``"FILE:SCALE"``. If a file named ``text`` exists, it has scale 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, or the scale is not a finite number.
    """
    place, _, scale = text.rpartition(":")
    if not place or Path(text).expanduser().exists():
        place, scale = text, "1"
    path = Path(place).expanduser()
    if path.is_dir():
        raise ValueError(f"--lora must be a .safetensors file, {path} is a folder")
    if not path.is_file():
        raise FileNotFoundError(f"--lora {text}: no file {path}")
    try:
        factor = float(scale)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise ValueError(f"--lora is FILE or FILE:SCALE with a finite number, got the scale {scale!r} in {text!r}")
    return path, factor
