"""Builds the documentation into ``build/html``: ``python docs/site.py``, or ``make docs``.

The pages are Markdown that reads well in a checkout: they link to each other, to the README and to results by relative
paths. For the site they are copied to ``build/pages``, with every file that they link to, and their links follow.
The README is the site's first page.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
HOME = ROOT / "README.md"
PAGES = ROOT / "build" / "pages"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
"""The target of a link or an image within the checkout, without its anchor."""


def place(source: Path) -> Path:
    """Where a file of the checkout lies among the staged pages, relative to them."""
    if source == HOME:
        return Path("index.md")
    if source.is_relative_to(DOCS):
        return source.relative_to(DOCS)
    return Path("files") / source.relative_to(ROOT)


def relative(target: Path, page: Path) -> str:
    """The link from a staged page to a staged file."""
    return "../" * (len(page.parts) - 1) + target.as_posix()


def stage(pages: Path = PAGES) -> list[Path]:
    """Copy the pages, and what they link to, as the site has them.

    Args:
        pages: the folder to write; what it held is deleted.

    Returns:
        What was written, relative to it.

    Raises:
        FileNotFoundError: a page links to a file that there is not.
    """
    shutil.rmtree(pages, ignore_errors=True)
    waiting = [HOME, *sorted([*DOCS.rglob("*.md"), *DOCS.rglob("*.css")])]
    known = set(waiting)
    for source in waiting:
        target = pages / place(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".md":
            shutil.copyfile(source, target)
            continue

        def follow(link: re.Match[str], source: Path = source) -> str:
            linked = (source.parent / link[1]).resolve()
            if not linked.is_file():
                raise FileNotFoundError(
                    f"{source.relative_to(ROOT)} links to {link[1]}, which is no file of the checkout"
                )
            if linked not in known:
                known.add(linked)
                waiting.append(linked)
            return relative(place(linked), place(source))

        target.write_text(LINK.sub(follow, source.read_text(encoding="utf-8")), encoding="utf-8")
    return [place(source) for source in waiting]


def build(folder: Path = ROOT) -> int:
    """Build the site from the staged pages; any warning is an error.

    Args:
        folder: holds ``zensical.toml``, and in ``build`` the staged pages and the installed package.

    Returns:
        0, or another number where there were warnings.
    """
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", "zensical.toml"]
    done = subprocess.run(command, cwd=folder, check=False, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    sys.stderr.write(done.stderr)
    # Griffe's warnings, of docstrings that do not fit their signatures, do not count as Zensical's.
    return done.returncode or int("griffe: " in done.stderr)


if __name__ == "__main__":
    stage()
    sys.exit(build())
