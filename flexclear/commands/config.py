"""``--config FILE``: options from a YAML file, or the ones that an image was drawn with."""

from __future__ import annotations

import difflib
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from flexclear.common.reading import parse_yaml, read_text, shown

IMAGES = (".png", ".gif", ".mp4")

KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text or a whole number",
    Path: "a path",
}
"""What messages call a value of each type."""


@dataclass(frozen=True)
class Entry:
    """What an option takes: type, whether several values, range, and default."""

    kind: type
    several: bool
    least: float | None
    most: float | None
    default: Any


def _entry(parameter: inspect.Parameter) -> Entry:
    annotation, info = typing.get_args(parameter.annotation)[:2]
    # T, T | None, or list[T] | None
    [kind] = [one for one in typing.get_args(annotation) or (annotation,) if one is not type(None)]
    several = typing.get_origin(kind) is list
    default = None if parameter.default is inspect.Parameter.empty else parameter.default
    return Entry(typing.get_args(kind)[0] if several else kind, several, info.min, info.max, default)


def read_config(path: Path, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return the values by parameter name.

    Args:
        path: a YAML file whose keys are options' names, with hyphens or underscores; or an image or video of
            ``flexclear generate``.
        entries: what each option takes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, an option is unknown, or a value is not one that the option takes.
    """
    path = path.expanduser()
    if not path.exists():
        raise FileNotFoundError(f"--config: no file {path}")
    if path.is_dir() or path.suffix.lower() in IMAGES:
        from flexclear.generation.given_back import read_options

        found: Any = read_options(path)
    else:
        try:
            found = parse_yaml(read_text(path))
        except ValueError as error:
            raise ValueError(f"--config {path}: {error}") from error
    if found is None:
        found = {}
    if not isinstance(found, dict):
        raise ValueError(
            f"--config {path} must hold options and their values, such as 'steps: 20'; it holds {shown(found)}"
        )
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in entries:
            near = difflib.get_close_matches(name, entries, n=1)
            meant = f"; meant {near[0].replace('_', '-')}?" if near else ""
            raise ValueError(f"--config {path}: there is no option {shown(key)}{meant}")
        if name in values:
            raise ValueError(f"--config {path}: {key} is given twice, with a hyphen and with an underscore")
        values[name] = _value(value, entries[name], f"--config {path}: {name.replace('_', '-')}")
    return values


def _value(value: Any, entry: Entry, name: str) -> Any:
    """Return a value converted to its option's type.

    Raises:
        ValueError: it is not one that the option takes.
    """
    if entry.several:
        items = value if isinstance(value, list) else [value]
        if not items:
            raise ValueError(f"{name} is an empty list; leave it out")
        return [_single(item, entry, name) for item in items]
    return _single(value, entry, name)


def _single(value: Any, entry: Entry, name: str) -> Any:
    kind = entry.kind
    taken: dict[type, tuple[type, ...]] = {
        bool: (bool,),
        int: (int,),
        float: (int, float),
        str: (str, int),
        Path: (str,),
    }
    fits = isinstance(value, taken[kind]) and (kind is bool or not isinstance(value, bool))
    if not fits or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name} must be {KINDS[kind]}, got {shown(value)}")
    low, high = entry.least is not None and value < entry.least, entry.most is not None and value > entry.most
    if low or high:
        limits = f"{entry.least:g} or more" if entry.most is None else f"from {entry.least} to {entry.most}"
        raise ValueError(f"{name} must be {limits}, got {shown(value)}")
    return kind(value)


def configurable(
    alternatives: Callable[[set[str], dict[str, Any]], set[str]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command to take ``--config FILE``. Options on the command line take precedence.

    Args:
        alternatives: returns the options that those on the command line replace, given their names and all values.

    The command gets ``config``, the file or None, and ``from_line``, the names of the options on the command line.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.name not in ("config", "from_line")]
        entries = {one.name: _entry(one) for one in own}

        def read(context: typer.Context, path: Path | None) -> Path | None:
            if path is not None and not context.resilient_parsing:
                context.default_map = {**(context.default_map or {}), **read_config(path, entries)}
            return path

        def run(context: typer.Context, **arguments: Any) -> Any:
            sources = {name: context.get_parameter_source(name) for name in arguments}
            line = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
            if arguments["config"] is not None:
                for name in alternatives(line, arguments) - line:
                    arguments[name] = entries[name].default
            return command(**arguments, from_line=line)

        config = inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option(
                    is_eager=True,
                    callback=read,
                    help="YAML file of options by name, or a generated image or video, whose options are "
                    "used; those on the command line take precedence.",
                ),
            ],
        )
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        run.__signature__ = signature.replace(parameters=[context, *parameters, config])  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in (context, *parameters, config)}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate
