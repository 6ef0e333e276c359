"""Commands and their parameters, read from the parser; ``python -m helpers.parser`` in tests/ writes the tables in the docs."""

from __future__ import annotations

import inspect
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.models

from flexclear import cli
from flexclear.commands.common import _OPTIONS

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "command-line.md"
BEGIN, END = "<!-- Written by tests/helpers/parser.py: -->", "<!-- So far. -->"


@dataclass(frozen=True)
class Parameter:
    """An option or argument of a command. ``flags``: the option's flags; ``several``: whether it may be repeated."""

    name: str
    flags: tuple[str, ...]
    kind: type
    several: bool
    least: float | None
    most: float | None
    required: bool
    default: Any
    help: str

    @property
    def flag(self) -> str | None:
        """The first flag; None for an argument."""
        return self.flags[0] if self.flags else None


def commands(
    group: Any = cli.app, path: tuple[str, ...] = ()
) -> typing.Iterator[tuple[tuple[str, ...], list[Parameter], str]]:
    """(path, parameters, what it does) of every command."""
    for command in group.registered_commands:
        signature = inspect.signature(command.callback)
        # A context has no annotation of typer's.
        found = [_parameter(one) for one in signature.parameters.values() if typing.get_args(one.annotation)]
        told = inspect.getdoc(command.callback) or ""
        yield (*path, command.name or command.callback.__name__), found, told
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*path, inner.name))


def _parameter(parameter: inspect.Parameter) -> Parameter:
    annotation, info = typing.get_args(parameter.annotation)[:2]
    [kind] = [one for one in typing.get_args(annotation) or (annotation,) if one is not type(None)]
    several = typing.get_origin(kind) is list
    flags: tuple[str, ...] = ()
    if isinstance(info, typer.models.OptionInfo):
        # In an annotation the first flag is in the place of the default.
        named = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
        flags = tuple(named or [f"--{parameter.name.replace('_', '-')}"])
        if kind is bool and not named:
            flags += (f"--no-{flags[0].removeprefix('--')}",)
    missing = parameter.default is inspect.Parameter.empty
    return Parameter(
        name=parameter.name,
        flags=flags,
        kind=typing.get_args(kind)[0] if several else kind,
        several=several,
        least=info.min,
        most=info.max,
        required=missing,
        default=None if missing else parameter.default,
        help=info.help or "",
    )


def tables() -> str:
    """The part of the page that is generated: each command, what it does, its arguments and options."""
    parts = []
    for path, parameters, told in commands():
        own = [one for one in parameters if one.name not in _OPTIONS]
        paragraphs = [" ".join(paragraph.split()) for paragraph in told.split("\n\n")]
        rows = [f"| {_called(one)} | {_takes(one)} | {_escaped(one.help)} |" for one in own]
        head = ["| | takes; default | |", "|---|---|---|"] if rows else []
        parts.append("\n\n".join([f"### {' '.join(path)}", *paragraphs, "\n".join([*head, *rows])]).rstrip())
    return "\n\n".join(parts)


def _called(one: Parameter) -> str:
    if not one.flags:
        return f"`{one.name.upper()}`" if one.required else f"`[{one.name.upper()}]`"
    return ", ".join(f"`{flag}`" for flag in one.flags)


def _takes(one: Parameter) -> str:
    if one.kind is bool:
        return f"`{one.flags[0]}`" if one.default else ""
    named = {int: "number", float: "number", str: "text", Path: "path"}[one.kind]
    if one.least is not None and one.most is not None:
        named += f", {one.least} to {one.most}"
    elif one.least is not None:
        named += f", {one.least:g} or more"
    if one.several:
        named += ", repeatable"
    if one.required and one.flags:
        named += ", required"
    return named if one.default is None else f"{named}; `{one.default}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def with_tables(page: str) -> str:
    """The page with up-to-date tables."""
    return re.sub(
        f"(?<={re.escape(BEGIN)}\n).*(?={re.escape(END)})", lambda match: f"\n{tables()}\n\n", page, flags=re.DOTALL
    )


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
