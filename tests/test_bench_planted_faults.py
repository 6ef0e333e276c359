"""The planted faults still fit the code; ``planted_faults.py`` beside each list plants them and keeps the score."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))
from bench.comfyui.faults import FAULTS as NODE_FAULTS
from bench.masks.faults import FAULTS
from bench.masks.planted_faults import ROOT, planted


@pytest.mark.parametrize("fault", [*FAULTS, *NODE_FAULTS], ids=lambda fault: fault.name)
def test_the_text_that_a_fault_replaces_is_there_once(fault):
    text = (ROOT / fault.file).read_text()
    assert planted(fault, text) != text


def test_every_fault_has_its_own_name():
    for faults in (FAULTS, NODE_FAULTS):
        assert len({fault.name for fault in faults}) == len(faults) >= 30


def test_a_fault_that_no_longer_fits_is_an_error():
    with pytest.raises(ValueError, match=f"fault {FAULTS[0].name}: the text to replace is 0 times in masks/shapes.py"):
        planted(FAULTS[0], "something else")
