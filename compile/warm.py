"""Warm start: save what one process has compiled to a file, and load it in another."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from flexclear.compile.files import whole_file

FORMAT = 1
_KEY, _PORTABLE, _BINARIES = "key.json", "portable.bin", "inductor"


@dataclass(frozen=True)
class WarmStart:
    """What ``load_artifacts`` did.

    Attributes:
        loaded: whether the artifacts are now in place.
        reason: why they are not; empty if they are.
        binaries: compiled libraries that were put into the Inductor cache.
    """

    loaded: bool
    reason: str = ""
    binaries: int = 0


def artifact_key(configuration: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What artifacts depend on: versions, device, and the caller's configuration (any JSON values)."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}, CUDA {torch.version.cuda}"
    else:
        device = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "format": FORMAT,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": torch.__version__,
        "device": device,
        "configuration": json.loads(json.dumps(configuration or {}, sort_keys=True, default=str)),
    }


def save_artifacts(path: str | Path, configuration: Mapping[str, Any] | None = None) -> Path:
    """Write what this process has compiled to a file.

    torch's portable cache artifacts carry graphs and GPU kernels. They do not carry Inductor's C++ libraries, so the
    ones that this process has loaded are added (Linux).

    Args:
        path: the file, a zip; written under another name first.
        configuration: what the artifacts are for (mode, recipe, model, ...); compared when they are loaded.

    Raises:
        ValueError: nothing has been compiled.
    """
    saved = torch.compiler.save_cache_artifacts()
    libraries = _loaded_libraries()
    if saved is None and not libraries:
        raise ValueError("nothing has been compiled in this process yet: run the model once, then save")
    path = Path(path)
    with whole_file(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr(_KEY, json.dumps(artifact_key(configuration)))
        if saved is not None:
            file.writestr(_PORTABLE, saved[0])
        for library in libraries:
            file.write(library, str(PurePosixPath(_BINARIES) / library.relative_to(_cache_folder()).as_posix()))
    return path


def load_artifacts(path: str | Path, configuration: Mapping[str, Any] | None = None) -> WarmStart:
    """Put the artifacts of ``save_artifacts`` into this process's caches, before anything is compiled.

    A file that is missing, damaged, or made with other versions, another device or another configuration is not used; the
    result says why. Load only files that you made yourself: they hold compiled code, which is run unchecked.
    """
    path = Path(path)
    if not path.is_file():
        return WarmStart(False, f"no file {path}")
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
            if broken is not None:
                return WarmStart(False, f"{path} is damaged at {broken}")
            names = set(file.namelist())
            key, own = json.loads(file.read(_KEY)), artifact_key(configuration)
            changed = [f"{name} {key.get(name)!r} is now {own[name]!r}" for name in own if key.get(name) != own[name]]
            if changed:
                return WarmStart(False, f"{path} is stale: {'; '.join(changed)}")
            libraries = [name for name in names if name.startswith(f"{_BINARIES}/")]
            for name in libraries:
                _unpack(file, name)
            if _PORTABLE in names and torch.compiler.load_cache_artifacts(file.read(_PORTABLE)) is None:
                return WarmStart(False, f"{path} was refused by torch")
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError, RuntimeError) as error:
        return WarmStart(False, f"{path} is damaged: {type(error).__name__}: {error}")
    return WarmStart(True, binaries=len(libraries))


def _cache_folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()).resolve()


def _loaded_libraries() -> list[Path]:
    """Inductor's C++ libraries that this process has mapped."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    folder = _cache_folder()
    mapped = {
        Path(line.split(maxsplit=5)[5]) for line in maps.read_text().splitlines() if len(line.split(maxsplit=5)) == 6
    }
    return sorted(path for path in mapped if path.is_relative_to(folder) and path.suffix == ".so" and path.is_file())


def _unpack(file: zipfile.ZipFile, name: str) -> None:
    inside = PurePosixPath(name).relative_to(_BINARIES)
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"{name} would be written outside the cache")
    target = _cache_folder() / inside
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".part")
    with os.fdopen(handle, "wb") as stream:
        stream.write(file.read(name))
    os.chmod(temporary, 0o755)
    os.replace(temporary, target)
