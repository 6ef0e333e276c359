"""An extension of Griffe: doctest examples in docstrings are code, wherever they stand."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

FLAGS = re.compile(r"\s+# doctest: .*$")


def fenced(text: str) -> str:
    """``text`` with fences around its doctest examples: from a line with ``>>>`` to the next empty one."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if not inside and line.startswith(">>> "):
            lines += ["", "```pycon"]
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(FLAGS.sub("", line) if inside else line)
    return "\n".join([*lines, "```"] if inside else lines)


class Doctests(Extension):
    """Fences the examples of every docstring."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
