"""Text written by people or other programs: lines, JSON and YAML. Every fault raises a one-line error."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

YAML_DEPTH = 100
"""How deeply lists and mappings may be nested in a YAML document."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def lines_of(text: str) -> list[str]:
    r"""The lines of a text, which end at ``\n``, ``\r\n`` or ``\r``.

    ``str.splitlines`` also splits at characters that may occur within a line, such as U+2028 and U+0085.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def check_unicode(text: str, name: str) -> str:
    """Return ``text`` unless it holds half of a surrogate pair, as undecodable arguments and ``"\\ud800"`` in JSON do.

    Raises:
        ValueError: it does; no tokenizer accepts it, and no file can hold it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {text!a} has {text[error.start]!a}") from error
    return text


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document.

    Raises:
        ValueError: it is not valid JSON, an object has a key twice, or it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: it is not valid YAML, a mapping has a key twice, a number cannot be read, or it is nested too deeply
            (``YAML_DEPTH``).
    """
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            # Counted here, since Python's recursion limit is process-wide, and test tools raise it.
            if self.depth >= YAML_DEPTH:
                raise ValueError("it is nested too deeply")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            # Checked before merge keys (<<) are resolved, because merged keys may be overridden.
            node = super().compose_mapping_node(anchor)
            first: dict[tuple[str, str], Any] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                known = first.setdefault((key.tag, key.value), key)
                if known is not key:
                    lines = f"{known.start_mark.line + 1} and {key.start_mark.line + 1}"
                    raise ValueError(f"the key {key.value!r} is given twice, in lines {lines}")
            return node

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except OverflowError as error:
        raise ValueError(f"a number is too large: {error}") from error


def shown(value: Any) -> str:
    """A value for a message, cut short if it is long."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:197] + "..."
