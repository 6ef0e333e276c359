"""The section of docs/results.md on the paper's tables and figures; ``python -m bench.paper.page`` writes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bench.machine import RESULTS, ROOT, origin_of
from bench.paper.counterparts import COUNTERPARTS, read

PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- Written by bench/paper/page.py: -->", "<!-- So far. -->"


def dated(file: Path) -> str:
    """Date and commit of a result, as the page has them."""
    found = origin_of(file)
    return f"{found['date']}, {found['commit']}" if found else "not committed yet"


def section(folder: Path = RESULTS, dated: Callable[[Path], str] = dated) -> str:
    """The table of commands, and a paragraph each on what came out."""
    results = read(folder)
    lines = ["| the paper's | | here | command | results |", "|---|---|---|---|---|"]
    for one in COUNTERPARTS:
        files = (
            "; ".join(f"[{name}](../bench/results/{name}) ({dated(folder / name)})" for name in one.results) or "none"
        )
        commands = "; ".join(f"`{command}`" for command in one.command.split("; "))
        lines.append(f"| {one.name} | {one.title} | {one.kind} | {commands} | {files} |")
    lines += ["", "What came out:", ""]
    lines += [f"- **{one.name}, {one.title}.** {one.said(results)}" for one in COUNTERPARTS]
    return "\n".join(lines) + "\n"


def with_section(page: str, dated: Callable[[Path], str] = dated) -> str:
    """The page with the section that the results say now."""
    return re.sub(
        f"(?<={re.escape(BEGIN)}\n).*(?={re.escape(END)})",
        lambda match: f"\n{section(dated=dated)}\n",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
