"""The site: pages are staged with what they link to, and it builds without a warning where Zensical is installed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tomllib

import pytest

from helpers.documents import DIRECTIVE, DOCS, EXTERNAL, LINK, ROOT, documented, prose

INSTALLED = all(importlib.util.find_spec(name) for name in ("zensical", "mkdocstrings_handlers"))


def loaded(name):
    """A module of docs/, by its file."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = loaded("site")


def test_staged_pages_link_to_staged_files(tmp_path):
    written = site.stage(tmp_path)
    assert len(written) == len(set(written))
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()} == set(written)
    for page in tmp_path.rglob("*.md"):
        for link in LINK.findall(prose(page)):
            if not EXTERNAL.match(link) and not link.startswith("#"):
                assert (page.parent / link.partition("#")[0]).is_file(), f"{page}: {link}"


def test_a_link_to_nothing_is_an_error(tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "README.md").write_text("[x](docs/nowhere.md)\n")
    for name, value in (("ROOT", tmp_path), ("DOCS", docs), ("HOME", tmp_path / "README.md")):
        monkeypatch.setattr(site, name, value)
    with pytest.raises(FileNotFoundError, match=r"README.md links to docs/nowhere.md"):
        site.stage(tmp_path / "pages")


def test_docstrings_are_made_readable():
    pytest.importorskip("griffe", reason="the site's tools are not installed: extra docs")
    docstrings = loaded("docstrings")
    given = [
        "What.",
        "",
        ">>> f(1)     # doctest: +SKIP",
        "2",
        "",
        "Args:",
        "    a, b: numbers",
        "        of something.",
        "    c: other.",
    ]
    assert docstrings.fenced(given)[:7] == ["What.", "", "", "```pycon", ">>> f(1)", "2", "```"]
    assert docstrings.split(given)[5:] == [
        "Args:",
        "    a: numbers",
        "        of something.",
        "    b: see ``a``.",
        "    c: other.",
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The site, built from copies: nothing is written into the checkout."""
    if not INSTALLED:
        pytest.skip("the site's tools are not installed: pip install 'flexclear[docs]'")
    folder = tmp_path_factory.mktemp("site")
    shutil.copyfile(ROOT / "zensical.toml", folder / "zensical.toml")
    (folder / "docs").mkdir()
    shutil.copyfile(DOCS / "docstrings.py", folder / "docs" / "docstrings.py")
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    only_python = shutil.ignore_patterns("__pycache__", "model", "students", "controlnet_model")
    for package, source in packages.items():
        shutil.copytree(
            ROOT / source, folder.joinpath("build", "site", *package.split(".")), ignore=only_python, dirs_exist_ok=True
        )
    site.stage(folder / "build" / "pages")
    assert site.build(folder) == 0
    return folder / "build" / "html"


def test_the_site_has_every_public_name(built):
    missing = []
    for page in (DOCS / "api").glob("*.md"):
        html = (built / "api" / f"{page.stem}.html").read_text(encoding="utf-8")
        present = set(re.findall(r'id="([^"]+)"', html))
        hidden = {f"flexclear.{page.stem}", *DIRECTIVE.findall(page.read_text(encoding="utf-8"))[:1]}
        missing += sorted(documented(page) - present - hidden)
    assert missing == []


def test_pages_load_nothing_from_elsewhere(built):
    for page in built.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img|iframe|link)[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"', html) == [], page
        for image in re.findall(r'<img[^>]*\bsrc="([^"]+)"', html):
            assert image.startswith("data:") or (page.parent / image).is_file(), f"{page}: {image}"
    for style in built.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8")
