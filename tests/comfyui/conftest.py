"""ComfyUI's engine, where ``make comfyui`` has downloaded it."""

from __future__ import annotations

import os

import pytest

from helpers.comfyui_engine import FOLDER, engine


@pytest.fixture(scope="session")
def comfyui():
    """Runs a function of ``helpers.comfyui_cases`` or the like in a process with ComfyUI, and returns what it returns."""
    if not (FOLDER / ".ready").exists():
        why = "ComfyUI was not downloaded: `make comfyui` does, with access to a package index"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    with engine() as process:
        yield lambda function, *args, **kwargs: process.submit(function, *args, **kwargs).result()
