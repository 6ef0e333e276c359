"""The settings that a folder's images were drawn with, stored beside them, so that images are never mixed with others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexclear.common.reading import parse_json, read_text
from flexclear.compile.files import whole_file

FILE = "settings.json"


def keep_settings(folder: Path, settings: Mapping[str, Any], others: str) -> None:
    """Write ``settings.json`` into a folder that has none; an existing one must hold the same settings.

    If several processes begin together, one writes it and the others compare.

    Args:
        folder: for the images; made if missing.
        settings: everything that the images depend on; stored as JSON, or with ``str``.
        others: what the user can do instead, for the message.

    Raises:
        ValueError: the folder holds images with other settings, images without settings, or a damaged ``settings.json``.
    """
    file = folder / FILE
    told = json.loads(json.dumps(settings, default=str))
    if not file.exists():
        if next(folder.glob("*.png"), None) is not None:
            raise ValueError(f"{folder} holds images, but no {FILE} that says how they were drawn. {others}")
        try:
            with whole_file(file, overwrite=False) as beside:
                beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            return
        except FileExistsError:
            pass
    try:
        known = dict(parse_json(read_text(file)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}. {others}") from error
    if known != told:
        raise ValueError(f"{folder} holds images with other settings ({'; '.join(differences(known, told))}). {others}")


def differences(known: Any, told: Any, where: str = "") -> list[str]:
    """Differences between two JSON objects, as ``"base.steps was 4, is 5"``. Long values are shortened."""
    if not isinstance(known, Mapping) or not isinstance(told, Mapping):
        old, new = (text if len(text := json.dumps(value)) <= 80 else f"{text[:77]}..." for value in (known, told))
        return [f"{where.rstrip('.')} was {old}, is {new}"]
    names = [name for name in {**known, **told} if known.get(name) != told.get(name)]
    return [line for name in names for line in differences(known.get(name), told.get(name), f"{where}{name}.")]
