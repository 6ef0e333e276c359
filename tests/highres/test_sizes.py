"""Sizes of stages: any aspect ratio, the same in all of them."""

from __future__ import annotations

import pytest

from flexclear.highres import parse_sizes
from flexclear.highres.sizes import stage_sizes


def test_one_number_is_the_longer_side_and_the_other_follows():
    assert stage_sizes([1024, 2048], 16, None) == [(1024, 1024), (2048, 2048)]
    assert stage_sizes([(768, 1024), 2048], 16, None) == [(768, 1024), (1536, 2048)]
    assert stage_sizes([1024, (2048, 1536)], 16, None) == [(1024, 768), (2048, 1536)]
    assert stage_sizes([2048, 4096], 16, (1000, 667)) == [(2048, 1360), (4096, 2736)]
    assert stage_sizes([4096], 16, (480, 3840)) == [(512, 4096)]


@pytest.mark.parametrize("shape", [(1000, 667), (333, 1000), (71, 64), (640, 1000)])
@pytest.mark.parametrize("first", [512, 528, 1024])
def test_rounding_to_tokens_is_no_other_aspect_ratio(shape, first):
    start = tuple(side // 4 for side in shape)
    sizes = stage_sizes([first, 2 * first, 8 * first], 16, start)
    for height, width in sizes:
        assert max(height, width) in (first, 2 * first, 8 * first)
        assert abs(width - height * start[1] / start[0]) <= 16 or abs(height - width * start[0] / start[1]) <= 16
    assert stage_sizes(sizes, 16, None) == sizes


def test_sizes_are_read_as_they_are_written():
    assert parse_sizes("1024,2048") == (1024, 2048)
    assert parse_sizes("768x1024, 2048") == ((768, 1024), 2048)
    for text in ("", "1024;2048", "1024,", "12x", "1024x768x3"):
        with pytest.raises(ValueError, match="sizes are written 1024,2048,4096"):
            parse_sizes(text)
