"""The package's long description: the README, whose links a package page cannot follow as they are.

Everything else is in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
IMAGE = re.compile(r"^!\[[^\]]*\]\((?![a-z]+:)([^)\s]+)\)\n+", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def long_description(readme: str, repository: str | None) -> str:
    """The README for a package page, which has no files beside it.

    With a repository, links lead there and images come from there, by the addresses that GitHub and GitLab give them. Without
    one, images are left out, and links become the names of their files: better than broken ones.

    Args:
        readme: its Markdown.
        repository: ``Repository`` of ``project.urls``, or None.
    """
    if repository is None:
        return LINK.sub(r"\1 (\2)", IMAGE.sub("", readme))
    place = repository.rstrip("/").removesuffix(".git")
    found = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:)([^)\s]+)", rf"\1{place}/raw/HEAD/\2", readme)
    return LINK.sub(rf"[\1]({place}/blob/HEAD/\2)", found)


if __name__ == "__main__":
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=long_description(
            (HERE / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Repository")
        ),
        long_description_content_type="text/markdown",
    )
