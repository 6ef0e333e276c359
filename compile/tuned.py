"""Blocks and kernel options measured to be fastest on this machine: kept in a file that takes precedence over ``kernels``.

``flexclear bench --tune`` writes the file, ``flexclear bench --forget`` deletes it, ``flexclear doctor`` and ``explain`` show its
contents. An entry applies to one device, type, head dim, radius and set of versions. A file that cannot be read causes a single
warning and is ignored: tuning is never a reason not to run.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flexclear.compile.files import user_folder, whole_file
from flexclear.compile.kernels import Kernel, Options, check_kernel_options, choose
from flexclear.masks.blocks import MANY_TOKENS, check_block_size

logger = logging.getLogger("flexclear")

FORMAT = 1
"""Format of the file; files of any other format are refused."""


@dataclass(frozen=True)
class Place:
    """What an entry applies to.

    Attributes:
        device: name of the GPU, or of the CPU with its number of threads.
        versions: versions of torch and of the compiler of its kernels.
        dtype: dtype of query, key and value, as torch names it, without ``torch.``.
        head_dim: channels of a head.
        radius: the window's radius, rounded by ``radius_class``.
        backward: whether a backward pass follows.
    """

    device: str
    versions: str
    dtype: str
    head_dim: int
    radius: int
    backward: bool


@dataclass(frozen=True)
class Tuned:
    """One entry.

    Attributes:
        place: what it applies to.
        block_size: tokens per (query, key-value) block of the mask.
        options: kernel options.
        gain: measured speed relative to the table's choice.
        tokens: number of image tokens when it was measured.
    """

    place: Place
    block_size: tuple[int, int]
    options: Options
    gain: float
    tokens: str

    def __str__(self) -> str:
        q, kv = self.block_size
        options = "".join(f", {name}={value}" for name, value in self.options)
        place = self.place
        return (
            f"{place.device}, {place.dtype}, head dim {place.head_dim}, r about {place.radius}: blocks {q} x {kv}{options} "
            f"({self.gain:.2f} x the default at {self.tokens} tokens, {place.versions})"
        )


def path() -> Path:
    """Path of the file."""
    return user_folder() / "tuned.json"


def radius_class(radius: int) -> int:
    """The nearest power of two, by ratio: 8 stands for 6 to 11, 16 for 12 to 22, 32 for 23 to 45."""
    return 1 << round(math.log2(radius))


def place_of(device: torch.device, dtype: torch.dtype, head_dim: int, radius: int, backward: bool = False) -> Place:
    """The key of the entry for these arguments, on this machine and with the installed versions."""
    name = str(dtype).removeprefix("torch.")
    return Place(device_name(device), _versions(), name, head_dim, radius_class(radius), backward)


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


@functools.cache
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def _versions() -> str:
    def found(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    triton = found("triton") or found("pytorch-triton")
    return f"torch {torch.__version__}" + (f", triton {triton}" if triton else "")


def find(device: torch.device, dtype: torch.dtype, head_dim: int, radius: int | None, backward: bool) -> Tuned | None:
    """The entry for these arguments, or None."""
    entries = _entries()
    if not entries or radius is None:
        return None
    return entries.get(place_of(device, dtype, head_dim, radius, backward))


def keep(found: Tuned) -> Path:
    """Add an entry, replacing an older one for the same key, and return the file. Later calls in this process use it."""
    _entries.cache_clear()
    kept = {**_entries(), found.place: found}
    return _write(kept)


def drop(place: Place) -> None:
    """Remove an entry, if there is one."""
    _entries.cache_clear()
    kept = dict(_entries())
    if kept.pop(place, None) is not None:
        _write(kept)


def forget() -> Path | None:
    """Delete the file, and return its path, or None if there was none."""
    _entries.cache_clear()
    file = path()
    if not file.is_file():
        return None
    file.unlink()
    return file


def _write(kept: dict[Place, Tuned]) -> Path:
    file = path()
    with whole_file(file) as beside:
        text = json.dumps({"format": FORMAT, "entries": [asdict(one) for one in kept.values()]}, indent=1)
        beside.write_text(text + "\n", encoding="utf-8")
    _entries.cache_clear()
    return file


@functools.cache
def _entries() -> dict[Place, Tuned]:
    """The file's entries, read once per process."""
    file = path()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return _refused(file, str(error))
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return _refused(file, f"it is not flexclear's, or not in format {FORMAT}")
        found = [_parsed(entry) for entry in content["entries"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _refused(file, f"{type(error).__name__}: {error}")
    return {one.place: one for one in found}


def _refused(file: Path, why: str) -> dict[Place, Tuned]:
    logger.warning(
        "%s is ignored (%s); defaults are used instead. flexclear bench --forget deletes the file", file, why
    )
    return {}


def _parsed(entry: Any) -> Tuned:
    """An entry of the file, checked: a bad one would cause an error in a model's call.

    Raises:
        ValueError, KeyError, TypeError: it is not a valid entry.
    """
    place = Place(**entry["place"])
    kinds = {"device": str, "versions": str, "dtype": str, "head_dim": int, "radius": int, "backward": bool}
    for name, kind in kinds.items():
        if type(getattr(place, name)) is not kind:
            raise ValueError(f"{name} is {getattr(place, name)!r}")
    q, kv = check_block_size(tuple(entry["block_size"]))
    given = dict(entry["options"])
    divisible = given.pop("IS_DIVISIBLE", None)  # follows from each mask's lengths
    if divisible not in (None, False):
        raise ValueError(f"IS_DIVISIBLE is {divisible!r}")
    return Tuned(place, (q, kv), check_kernel_options(given), float(entry["gain"]), str(entry["tokens"]))


def choose_tuned(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    reach: int | None = None,
    backward: bool = False,
    seq_len: int = 0,
    text_padded: bool = False,
    block_size: tuple[int, int] | None = None,
    options: Options = (),
    **others: Any,
) -> Kernel:
    """Like ``kernels.choose``, but with the entry for a window of this reach if no blocks or options are requested.

    Padded text and very long sequences use the table: they take more registers and longer lists than the tuned kernels.

    Args:
        reach: the window's reach, a disc's radius; None: several windows, or unbounded.
        others: the rest, see ``kernels.choose``.
    """
    if block_size is None and not options and not text_padded and seq_len < MANY_TOKENS:
        found = find(device, dtype, head_dim, reach, backward)
        if found is not None:
            block_size, options = found.block_size, found.options
    return choose(
        device,
        dtype,
        head_dim,
        reach=reach,
        backward=backward,
        seq_len=seq_len,
        text_padded=text_padded,
        block_size=block_size,
        options=options,
        **others,
    )


def usable(device: torch.device) -> list[Tuned]:
    """The entries for ``device`` and the installed versions."""
    here = device_name(device), _versions()
    return [one for one in _entries().values() if (one.place.device, one.place.versions) == here]
