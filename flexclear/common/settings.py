"""Settings from YAML, read into dataclasses. Errors name the setting at fault."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flexclear.common.reading import check_unicode, parse_yaml, read_text, shown

Settings = TypeVar("Settings")


def read_settings_file(path: str | Path, make: Callable[[Mapping[str, Any], Path], Settings]) -> Settings:
    """The result of ``make`` for a YAML file's mapping and the file's folder. Errors name the file.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: it is not valid YAML, or ``make`` raises.
    """
    path = Path(path).expanduser()
    found = read_mapping(path)
    try:
        return make(found, path.parent)
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise type(error)(f"{path}: {error}") from error


def read_mapping(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file of settings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid YAML, gives a setting twice, or holds no settings.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    text = read_text(path)
    try:
        found = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold settings, such as 'model: embedded'; got {type(found).__name__}")
    return found


def build(kind: Any, found: Any, where: str) -> Any:
    """A dataclass ``kind`` from a YAML value; ``where`` is put before the names in messages.

    Raises:
        TypeError, ValueError: settings are unknown, missing, or of another type.
    """
    if not isinstance(found, Mapping):
        raise TypeError(f"{where.rstrip('.')} must hold settings of its own, got {shown(found)}")
    hints = typing.get_type_hints(kind)
    unknown = [str(name) for name in found if name not in hints]
    if unknown:
        near = {name: difflib.get_close_matches(name, hints, n=1) for name in unknown}
        said = ", ".join(f"{where}{name}" + (f" (meant {near[name][0]}?)" if near[name] else "") for name in unknown)
        raise ValueError(f"unknown setting{'s' if len(unknown) > 1 else ''} {said}. Known: {', '.join(hints)}")
    missing = [
        part.name
        for part in dataclasses.fields(kind)
        if part.name not in found
        and part.default is dataclasses.MISSING
        and part.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{', '.join(where + name for name in missing)} is missing")
    return kind(**{name: _value(hints[name], value, where + name) for name, value in found.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` converted to the field's type: YAML reads 1e-4 as text, and has lists instead of tuples."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    hint, *others = [option for option in options if option is not type(None)]
    if others:
        hint = next((option for option in (hint, *others) if isinstance(value, option)), hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where + ".")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{where} must be a list, got {shown(value)}")
        element = typing.get_args(hint)[0]
        return tuple(_value(element, part, f"{where}[{index}]") for index, part in enumerate(value))
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{where} must hold names and values, got {shown(value)}")
        return {str(name): _value(typing.get_args(hint)[1], part, f"{where}.{name}") for name, part in value.items()}
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{where} is too large: {shown(value)}") from None
        except ValueError:
            pass
    elif (isinstance(value, bool) == (hint is bool)) and isinstance(value, hint):
        return value
    raise TypeError(f"{where} must be {'a path' if hint is Path else hint.__name__}, got {shown(value)}")


def check_values(settings: Any, where: str = "") -> None:
    """Raise for unusable numbers and for text that no tokenizer accepts, in a dataclass of settings.

    Raises:
        ValueError: a number is not finite or exceeds 64 bits, or text is not valid Unicode; the message begins with its
            name.
    """
    if dataclasses.is_dataclass(settings):
        for part in dataclasses.fields(settings):
            check_values(getattr(settings, part.name), f"{where}.{part.name}" if where else part.name)
    elif isinstance(settings, Mapping):
        for name, value in settings.items():
            check_values(value, f"{where}.{name}")
    elif isinstance(settings, tuple | list):
        for index, value in enumerate(settings):
            check_values(value, f"{where}[{index}]")
    elif isinstance(settings, int | float):
        if isinstance(settings, int) and not -(1 << 63) <= settings < 1 << 63:
            raise ValueError(f"{where} must fit into 64 bits, got {shown(settings)}")
        if not math.isfinite(settings):
            raise ValueError(f"{where} must be finite, got {settings!r}")
    elif isinstance(settings, str):
        check_unicode(settings, where)


def check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")


def check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")


def check_number(name: str, value: float, least: float) -> None:
    if not (value >= least and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number >= {least}, got {value!r}")
