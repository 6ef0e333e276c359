"""An extension of Griffe: what the docstrings of this project say in a way that it does not read by itself.

Doctest examples are code wherever they stand, and one entry may be about several parameters.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

FLAGS = re.compile(r"\s+# doctest: .*$")
SECTION = re.compile(r"^(\s*)(Args|Attributes):$")
SEVERAL = re.compile(r"^(\s+)(\w+(?:, \w+)+):")


def fenced(lines: list[str]) -> list[str]:
    """Lines with fences around doctest examples: from one with ``>>>`` to the next empty one."""
    found: list[str] = []
    inside = False
    for line in lines:
        if not inside and line.startswith(">>> "):
            found += ["", "```pycon"]
            inside = True
        elif inside and not line.strip():
            found.append("```")
            inside = False
        found.append(FLAGS.sub("", line) if inside else line)
    return [*found, "```"] if inside else found


def split(lines: list[str]) -> list[str]:
    """Lines with an entry for each of several parameters that share one: ``a, b: what`` becomes ``a: what``, ``b: see a``."""
    found: list[str] = []
    section: str | None = None
    pending: list[str] = []
    for line in lines:
        heading = SECTION.match(line)
        indent = line[: len(line) - len(line.lstrip())]
        if section is not None and (not line.strip() or len(indent) <= len(section) + 4):
            found += pending
            pending = []
        if heading:
            section = heading[1]
        elif line.strip() and section is not None and len(indent) <= len(section):
            section = None
        several = SEVERAL.match(line)
        if section is not None and several and len(indent) == len(section) + 4:
            first, *others = several[2].split(", ")
            pending = [f"{several[1]}{name}: see ``{first}``." for name in others]
            line = f"{several[1]}{first}:{line[several.end() :]}"
        found.append(line)
    return found + pending


class Docstrings(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(split(fenced(obj.docstring.value.splitlines())))
