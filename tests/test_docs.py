"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = [
    "flexclear.alternatives.flops",
    "flexclear.alternatives.names",
    "flexclear.explanation",
    "flexclear.explanation.window",
    "flexclear.masks",
    "flexclear.masks.blocks",
    "flexclear.masks.cost",
    "flexclear.masks.dense",
    "flexclear.masks.layout",
    "flexclear.masks.factories",
    "flexclear.testing",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_hold(name):
    module = importlib.import_module(name)
    namespace = {**vars(importlib.import_module("flexclear.masks")), **vars(module)}
    result = doctest.testmod(module, extraglobs=namespace)
    assert result.failed == 0
    assert result.attempted > 0
