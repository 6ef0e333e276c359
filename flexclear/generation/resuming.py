"""``flexclear generate --resume``: find the finished images of a set by the settings stored in each."""

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
    """Find the existing images of a set, and where the others go.

    An image belongs to the set if its settings are the wanted ones and the same versions drew it. Images with other names or
    from other sets are not touched.

    Args:
        target: target of the set.
        wanted: settings of every image, without those that are known only after drawing.
        versions: versions of the libraries.

    Returns:
        Paths by the image's number in the set, from 1; and a target that gives each missing image the number that it would have
        had.

    Raises:
        ValueError: there are images, but none of them belongs to this set.
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
            continue  # from another program, or damaged
        candidates[_key(known[path])].append((place, path))
    kept: dict[int, Path] = {}
    first = None
    for number, entry in enumerate(told, 1):
        near = candidates[_key(entry)]
        found = next((one for one in near if not _differing(known[one[1]], entry)), None)
        if found is not None:
            near.remove(found)  # one image does not count twice if the set contains the same request twice
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
    """Settings of an image that differ from the wanted ones. Additional settings are not compared."""
    settings = {name: found["settings"].get(name) for name in wanted["settings"]}
    return differences({"settings": settings, "versions": found.get("versions")}, wanted)


def _stranger(path: Path, known: Mapping[Path, dict[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> str:
    """Why the last existing image does not belong to the set."""
    if path not in known:
        cause = "it carries no settings"
    else:
        differing = [_differing(known[path], entry) for entry in wanted]
        least: list[str] = min(differing, key=len)
        cause = "; ".join(least)
    return (
        f"--resume: {path} is not of this set ({cause}), nor is any other image there. Without --resume a folder's numbers "
        "continue after it"
    )
