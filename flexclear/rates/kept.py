"""Results of ``flexclear bench`` on this machine: a JSON file for each device, model and type in the user's cache folder."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from flexclear.common.reading import parse_json, read_text
from flexclear.common.versions import versions
from flexclear.compile.files import user_folder, whole_file
from flexclear.compile.tuned import device_name
from flexclear.rates.rates import Rates, published

logger = logging.getLogger("flexclear")

FORMAT = 1


def folder() -> Path:
    """Where they are."""
    return user_folder() / "bench"


def name_of(dtype: torch.dtype) -> str:
    """Name of a type in files and tables."""
    return str(dtype).removeprefix("torch.")


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Hardware, type and versions to record with results."""
    return {"device": device_name(device), "dtype": name_of(dtype), **versions(("torch", "diffusers", "triton"))}


def keep(model: str, about: dict[str, Any], content: dict[str, Any]) -> Path:
    """Write the results of a run, replacing older ones for the same model, device and type. Return the file.

    Args:
        model: name of what was measured.
        about: ``facts`` and the run's settings, including ``head_dim``.
        content: other entries of the file, including ``rates`` (fields of ``Rates`` without the source).
    """
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{model} {about['device']} {about['dtype']}".lower()).strip("-")
    file = folder() / f"{slug}.json"
    with whole_file(file) as beside:
        text = json.dumps({"format": FORMAT, "facts": about, **content}, indent=1)
        beside.write_text(text + "\n", encoding="utf-8")
    return file


def rates_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Rates:
    """The rates last measured on this machine for this device, type, head dim and torch, or else published ones."""
    wanted = {**facts(device, dtype), "head_dim": head_dim}
    keys = ("device", "dtype", "torch", "head_dim")
    newest: tuple[float, Path, Any] | None = None
    for file in sorted(folder().glob("*.json")):
        try:
            content = parse_json(read_text(file))
            about = content["facts"]
            if content["format"] != FORMAT or any(about.get(key) != wanted[key] for key in keys):
                continue
            compiled = ", blocks compiled" if about.get("compiled") else ""
            found = _parsed(content["rates"], f"measured here with {about['model']}{compiled} ({file})")
            when = file.stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning(
                "%s is ignored (%s: %s): delete it, or run flexclear bench again", file, type(error).__name__, error
            )
            continue
        if newest is None or when > newest[0]:
            newest = when, file, found
    return published(head_dim) if newest is None else newest[2]


def as_json(rates: Rates) -> dict[str, float]:
    """Return rates in the form that ``keep`` takes."""
    return {name: value for name, value in asdict(rates).items() if name != "source"}


def _parsed(content: Any, source: str) -> Rates:
    names = {one.name for one in fields(Rates)} - {"source"}
    if set(content) != names:
        raise ValueError(f"rates are {sorted(content)}, not {sorted(names)}")
    found = {name: float(content[name]) for name in names}
    for name in names:
        lowest_is_0 = name in ("token", "call")
        if not (0 <= found[name] < float("inf")) or (found[name] == 0 and not lowest_is_0):
            raise ValueError(f"{name} is {found[name]}")
    return Rates(source, **found)
