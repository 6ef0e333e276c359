"""The pages: every one is in the navigation, every link and anchor is there, every public name and message is the code's."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

import flexclear
from flexclear.families import FAMILIES

from helpers.documents import (
    DOCS,
    EXTERNAL,
    LINK,
    README,
    ROOT,
    anchors,
    documented,
    is_module,
    pages,
    prose,
    title,
)

SITE = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]


def in_navigation(entries):
    for entry in entries:
        for target in entry.values():
            if isinstance(target, str):
                yield target
            else:
                yield from in_navigation(target)


def test_the_navigation_names_every_page_once():
    named = list(in_navigation(SITE["nav"]))
    assert len(named) == len(set(named))
    assert set(named) == {"index.md"} | {page.relative_to(DOCS).as_posix() for page in pages() if page != README}


def test_the_readme_counts_the_model_classes():
    assert f"\n{len(FAMILIES)} model classes of diffusers" in README.read_text(encoding="utf-8")


def test_the_site_fetches_no_fonts():
    assert SITE["theme"]["font"] is False


@pytest.mark.parametrize("page", pages(), ids=title)
def test_links_and_anchors_lead_somewhere(page):
    missing = []
    for link in LINK.findall(prose(page)):
        if EXTERNAL.match(link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_file() or not target.is_relative_to(ROOT) or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


PLACES = ("bench", "compile", "docs", "examples", "flexclear", "masks", "tests")


def test_files_that_pages_name_are_there():
    named = {
        path
        for page in pages()
        for path in re.findall(rf"`((?:{'|'.join(PLACES)})/[\w./-]*)(?:::\w+)?`", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 40
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_pages_link_to_no_other_host_than_those_that_are_cited():
    hosts = {link.split("/")[2] for page in pages() for link in LINK.findall(prose(page)) if "//" in link}
    assert hosts <= {"arxiv.org", "github.com", "huggingface.co"}


PACKAGES = sorted({name for name in [*flexclear.__all__, "testing"] if is_module(f"flexclear.{name}")})
FUNCTIONS = sorted(set(flexclear.__all__) - set(PACKAGES) - {"__version__"})


def test_the_api_reference_has_every_public_name():
    assert {f"flexclear.{name}" for name in FUNCTIONS} <= documented(DOCS / "api" / "flexclear.md")
    missing = []
    for package in PACKAGES:
        found = documented(DOCS / "api" / f"{package}.md")
        for name in importlib.import_module(f"flexclear.{package}").__all__:
            path = f"flexclear.{package}.{name}"
            # A module of the same name hides it from a documentation that reads source: it is named in full then.
            if not {path, f"{path}.{name}"} & found:
                missing.append(path)
    assert missing == []


PLACE = "…"
PRINTF = re.compile(r"%[sdrif]|%\.\d+f")


def text_of(node):
    """A string of the code with a mark for whatever is filled in, or None."""
    if isinstance(node, ast.Constant):
        return PRINTF.sub(PLACE, node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else PLACE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        both = [text_of(node.left), text_of(node.right)]
        return None if both == [None, None] else "".join(PLACE if one is None else one for one in both)
    return None


def texts_of_the_code():
    """Every string of the package, docstrings left out."""
    found = []
    for folder in ("flexclear", "masks", "compile"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found += [
                text
                for node in ast.walk(tree)
                if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
                for child in ast.iter_child_nodes(node)
                if (text := text_of(child))
            ]
    return found


def quoted_messages(page):
    return re.findall(r"^> `(.*)`$", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_message_that_troubleshooting_quotes_is_raised_by_the_code():
    quoted = quoted_messages(DOCS / "troubleshooting.md")
    assert len(quoted) >= 40
    assert len(set(quoted)) == len(quoted)
    code = "\n".join(texts_of_the_code())
    assert [message for message in quoted if message not in code] == []
    assert all(len(message.replace(PLACE, "")) >= 20 for message in quoted), "short ones are everywhere"


def test_the_table_of_sizes_by_memory_is_the_computed_one():
    page = (DOCS / "guide" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+, compiled.*$", page, re.MULTILINE)
    assert len(rows) == 8
    assert set(rows) <= set((ROOT / "bench" / "results" / "on_paper.md").read_text(encoding="utf-8").splitlines())


def test_results_are_told_in_one_place():
    """No row of a table of the results stands on two pages, but for the README's own table."""
    rows = {}
    for page in pages():
        for line in set(page.read_text(encoding="utf-8").splitlines()):
            if line.startswith("|") and len(re.findall(r"\d", line)) > 6:
                rows.setdefault(line, []).append(title(page))
    twice = {line: where for line, where in rows.items() if len(where) > 1 and "README.md" not in where}
    assert twice == {}
    assert Path(README).read_text(encoding="utf-8").count("\n|---") == 2, "extras, and one table of gains"
