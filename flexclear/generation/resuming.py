"""``flexclear generate --resume``: which images of a set are finished, told by the settings that each carries."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexclear.images.files import Target, numbered, read_settings
from flexclear.images.folder_settings import differences


def find_finished(
    target: Target, wanted: Sequence[Mapping[str, Any]], versions: Mapping[str, str]
) -> tuple[dict[int, Path], Target]:
    """The images of a set that are there, and where the others go.

    An image is of the set if its settings are those wanted and the same versions drew it. Images under other names or of
    other sets stay as they are.

    Args:
        target: of the set.
        wanted: settings of every image; those that are known after drawing only are left out.
        versions: of the libraries.

    Returns:
        Paths by the image's number in the set, from 1; and the target under which a missing image gets the number that it
        would have had.

    Raises:
        ValueError: there are images, and none of them is of this set.
    """
    told = [{"settings": json.loads(json.dumps(entry)), "versions": dict(versions)} for entry in wanted]
    single = [(1, target.path)] if target.is_file and target.path.exists() else []
    places = single if target.is_file else numbered(target.path)
    known: dict[Path, dict[str, Any]] = {}
    candidates: dict[tuple[str, str], list[tuple[int, Path]]] = defaultdict(list)
    for place, path in places:
        try:
            known[path] = read_settings(path)
        except (OSError, ValueError):
            continue  # of another program, or damaged
        candidates[_key(known[path])].append((place, path))
    kept: dict[int, Path] = {}
    first = None
    for number, entry in enumerate(told, 1):
        near = candidates[_key(entry)]
        found = next((one for one in near if not _differing(known[one[1]], entry)), None)
        if found is not None:
            near.remove(found)  # one image is not two of a set that asks twice for the same
            place, kept[number] = found
            first = place - number + 1 if first is None else first
    if places and not kept:
        raise ValueError(_stranger(places[-1][1], known, told))
    if target.is_file:
        return kept, target
    return kept, replace(target, first=1 if first is None else max(first, 1))


def _key(entry: Mapping[str, Any]) -> tuple[str, str]:
    return str(entry["settings"].get("prompt")), str(entry["settings"].get("seed"))


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What an image says of itself otherwise than wanted; what it says besides is not compared."""
    settings = {name: found["settings"].get(name) for name in wanted["settings"]}
    return differences({"settings": settings, "versions": found.get("versions")}, wanted)


def _stranger(path: Path, known: Mapping[Path, dict[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> str:
    """Why the last image that is there is none of the set."""
    if path not in known:
        cause = "it carries no settings"
    else:
        differing = [_differing(known[path], entry) for entry in wanted]
        least: list[str] = min(differing, key=len)
        cause = "; ".join(least)
    return (
        f"--resume: {path} is not of this set ({cause}), nor is any other image there. Without --resume a folder's numbers "
        "go on after it"
    )
