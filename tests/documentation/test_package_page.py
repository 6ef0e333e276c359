"""The README as a package page shows it, which has none of the checkout's files beside it."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from helpers.documents import EXTERNAL, FENCE, LINK, ROOT

BUILD = """
import setuptools.build_meta as backend
print(backend.prepare_metadata_for_build_wheel("metadata"))
"""


def description(folder, repository):
    """The long description that a build of the project writes, which names this repository or none."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package in tools["packages"]:
        parts = package.split(".")
        beside = tools["package-dir"].get(".".join(parts[:2]))
        place = folder.joinpath(*([beside, *parts[2:]] if beside else parts))
        place.mkdir(parents=True, exist_ok=True)
    if repository:
        settings = folder / "pyproject.toml"
        text = settings.read_text(encoding="utf-8")
        assert text.count("[project.urls]\n") == 1
        settings.write_text(text.replace("[project.urls]\n", f'[project.urls]\nRepository = "{repository}"\n'))
    (folder / "metadata").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (written,) = folder.glob("metadata/*.dist-info/METADATA")
    found = email.message_from_bytes(written.read_bytes())
    assert found["Description-Content-Type"] == "text/markdown"
    return found.get_payload()


def links(text):
    return LINK.findall(FENCE.sub("", text))


@pytest.mark.parametrize("repository", [None, "https://example.org/someone/flexclear.git"], ids=["none", "named"])
def test_no_link_of_the_package_page_is_relative(tmp_path, repository):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = [link for link in links(readme) if not EXTERNAL.match(link)]
    assert len(relative) > 10
    text = description(tmp_path, repository)
    assert [link for link in links(text) if not EXTERNAL.match(link)] == []
    assert len(text) > 4000
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    if repository is None:
        assert images == []
        assert all(f"({link})" in text for link in relative if link.endswith(".md")), "named, if not linked"
    else:
        place = repository.removesuffix(".git")
        (image,) = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme)
        assert images == [f"{place}/raw/HEAD/{image}"]
        assert {f"{place}/blob/HEAD/{link}" for link in relative} - {f"{place}/blob/HEAD/{image}"} <= set(links(text))
    assert FENCE.findall(text) == FENCE.findall(readme), "code is as it was"
