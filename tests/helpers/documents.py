"""The README and the pages of docs/: their text, links, headings and code blocks."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
EXTERNAL = re.compile(r"[a-z]+:")
HEADING = re.compile(r"^#{1,6} (.*?)(?:\s*\{\s*#([\w.-]+)\s*\})?$", re.MULTILINE)
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


def pages() -> list[Path]:
    """The README and every page."""
    return [README, *sorted(DOCS.rglob("*.md"))]


def title(page: Path) -> str:
    """A page's path in the checkout, for test ids and messages."""
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: the page that has it.
        language: language in the fence.
        code: its lines.
        line: number of its first line.
    """

    page: Path
    language: str
    code: str
    line: int

    @property
    def name(self) -> str:
        return f"{title(self.page)}:{self.line}"


def blocks(page: Path, language: str) -> list[Block]:
    """The code blocks of a language on a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, found[1], textwrap.dedent(found[2]), text.count("\n", 0, found.start()) + 2)
        for found in FENCE.finditer(text)
        if found[1] == language
    ]


def commands(page: Path) -> list[str]:
    """The lines of a page's console blocks that begin with ``$ ``, without that prefix."""
    return [
        line.removeprefix("$ ")
        for block in blocks(page, "console")
        for line in block.code.splitlines()
        if line.startswith("$ ")
    ]


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown's toc makes it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    plain = re.sub(r"[^\w\s-]", "", plain.encode("ascii", "ignore").decode()).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)


def anchors(page: Path) -> set[str]:
    """Possible targets of links into a page: its headings, and the objects that it documents."""
    found = {given or slug(text) for text, given in HEADING.findall(prose(page))}
    return found | documented(page)


def documented(page: Path) -> set[str]:
    """The objects that a page's directives document, including members of packages."""
    import importlib

    found = set()
    for path in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
        found.add(path)
        try:
            package = importlib.import_module(path)
        except ImportError:
            continue
        found |= {f"{path}.{name}" for name in getattr(package, "__all__", ()) if not is_module(f"{path}.{name}")}
    return found


def is_module(path: str) -> bool:
    """Whether a dotted path is that of a module, which hides an object of the same name in its package."""
    from importlib.util import find_spec

    return find_spec(path) is not None
