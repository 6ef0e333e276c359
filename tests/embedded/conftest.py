"""The embedded pipeline, loaded once for all its tests."""

from __future__ import annotations

import pytest

from flexclear import embedded
from flexclear.embedded.vocabulary import Vocabulary, read_vocabulary


@pytest.fixture(scope="session")
def pipe():
    loaded = embedded.pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return read_vocabulary(embedded.model_directory())
