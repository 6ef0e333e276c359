"""``docs/support.md`` is what the contract says, and every test that it names runs over the families that it says."""

from __future__ import annotations

import importlib
from pathlib import Path

import diffusers
import pytest

from flexclear.families import FAMILIES, family_of

from .support import FILE, MAY, MUST, REFUSES, support
from .table import ROWS

TESTS = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore")
def test_the_committed_table_is_current():
    assert FILE.read_text() == support(), "run: make support"


def families_of(test):
    """Names of the families that a test is parametrised over, None where it is over none."""
    file, name = test
    if file.startswith("../"):
        assert f"def {name}(" in (TESTS / "contract" / file).read_text(), test
        return None
    function = getattr(importlib.import_module(f"contract.{file.removesuffix('.py')}"), name)
    for mark in function.pytestmark:
        if mark.name == "parametrize" and "row" in mark.args[0]:
            cases = [getattr(case, "values", (case,)) for case in mark.args[1]]
            return {values[0].name for values in cases}
    raise AssertionError(f"{test} is over no families")


@pytest.mark.parametrize("test", MUST.values(), ids=MUST)
def test_what_all_must_do_is_tested_over_all(test):
    assert families_of(test) in (None, {row.name for row in ROWS})


@pytest.mark.parametrize("ability", MAY)
def test_what_some_do_is_tested_over_those_and_refused_by_the_others(ability):
    assert families_of(MAY[ability]) in (None, {row.name for row in ROWS if ability in row.abilities})
    assert families_of(REFUSES) == {row.name for row in ROWS if row.refuses}


def test_every_family_has_a_row():
    assert {family_of(row.build()).model_class for row in ROWS} == {family.model_class for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_class)
def test_every_model_and_pipeline_is_diffusers_s_and_named_by_a_test(family):
    tests = "\n".join(path.read_text() for path in TESTS.rglob("*.py") if path.parent != Path(__file__).parent)
    assert family.pipelines
    for name in (family.model_class, *family.pipelines):
        assert hasattr(diffusers, name), name
        assert name in tests, name
