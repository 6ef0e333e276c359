"""The README's support table is what the code says, and every row has its tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexclear.families import FAMILIES
from flexclear.families.table import support_table

ROOT = Path(__file__).parents[2]


def test_the_readme_holds_the_table_that_the_code_generates():
    readme = (ROOT / "README.md").read_text()
    assert support_table() in readme, "run: python -m flexclear.families.table, and paste it into README.md"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_class)
def test_every_row_is_covered_by_tests_that_name_its_model_and_each_of_its_pipelines(family):
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    assert family.pipelines
    for name in (family.model_class, *family.pipelines):
        assert name in tests, name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_class)
def test_every_family_is_a_class_of_diffusers(family):
    import diffusers

    assert hasattr(diffusers, family.model_class)
    assert all(hasattr(diffusers, name) for name in family.pipelines)
