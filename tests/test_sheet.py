"""Contact sheets: labels are whole and images lie where they should."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flexclear.images.sheet import contact_sheet


@pytest.mark.parametrize("lines", [1, 2, 3, 5])
def test_a_column_label_of_any_height_is_drawn_whole_above_the_pictures(lines):
    picture = Image.new("RGB", (4, 4), "red")
    sheet = np.asarray(contact_sheet([[picture]], ["a row"], ["\n".join(["label"] * lines)], cell=64))
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 50)
    first = np.flatnonzero(red.any(1))[0]
    inked = np.flatnonzero((sheet.max(2) < 128).any(1) & (np.arange(len(sheet)) < first))
    assert inked[0] > 2
    assert inked[-1] < first - 2
    runs = 1 + np.count_nonzero(np.diff(inked) > 1)
    assert runs == lines
    assert red.sum() == 64 * 64


def test_labels_that_do_not_match_the_grid_are_an_error():
    with pytest.raises(ValueError, match="2 row labels for 1 rows"):
        contact_sheet([[Image.new("RGB", (4, 4))]], ["one", "two"], ["column"])
