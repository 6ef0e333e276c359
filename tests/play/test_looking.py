"""The window over an image: which pixels fade, where the lines are, and which token a click means."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flexclear.masks import Layout
from flexclear.masks.pictures import QUERY, SEEN
from flexclear.play.looking import FADED, LEAST_SIDE, Grid, seen_from, shown, with_window


def disc(height, width, token, radius):
    """By its definition."""
    rows, columns = np.indices((height, width))
    return (rows - token[0]) ** 2 + (columns - token[1]) ** 2 < radius**2


@pytest.mark.parametrize(("token", "radius"), [((0, 0), 1), ((3, 5), 3), ((6, 0), 4), ((6, 8), 20)])
def test_a_token_sees_the_disc_around_it(token, radius):
    grid = Grid(7, 9, 8, 4)
    assert (seen_from(grid, token, radius) == disc(7, 9, token, radius)).all()


@pytest.mark.parametrize(
    ("size", "scale"), [((64, 48), 8), ((128, 128), 4), ((512, 256), 1), ((2048, 1024), 1), ((200, 8), 3)]
)
def test_a_small_image_is_enlarged_by_a_whole_factor_and_a_large_one_is_not(size, scale):
    image = Image.new("RGB", size)
    assert Grid.of(image, Layout(size[1] // 8, size[0] // 8, 5)) == Grid(size[1] // 8, size[0] // 8, 8, scale)
    assert shown(image).size == (size[0] * scale, size[1] * scale)
    assert max(shown(image).size) >= LEAST_SIDE


@pytest.mark.parametrize("layout", [Layout(6, 9), Layout(7, 10), Layout(9, 7), Layout(8, 9)])
def test_tokens_that_do_not_lie_over_the_image_as_squares_have_no_grid(layout):
    assert Grid.of(Image.new("RGB", (72, 56)), Layout(7, 9)) is not None
    assert Grid.of(Image.new("RGB", (72, 56)), layout) is None


def test_every_pixel_of_the_page_s_image_is_of_one_token():
    grid = Grid(2, 3, 8, 2)
    for y in range(2 * 16):
        for x in range(3 * 16):
            assert grid.token_at(x, y) == (y // 16, x // 16)
    assert grid.token_at(48, 32) == (1, 2), "a click on the last edge"
    assert grid.token_at(-1, -1) == (0, 0)


@pytest.mark.parametrize(("px", "size"), [(8, (72, 56)), (16, (1040, 560))])
@pytest.mark.parametrize("radius", [None, 1, 3, 100])
def test_what_is_not_seen_fades_and_the_rest_stays(px, size, radius):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 200, (size[1], size[0], 3), np.uint8))
    grid, token = Grid.of(image, Layout(size[1] // px, size[0] // px)), (4, 3)
    before = np.asarray(shown(image)).astype(int)
    after = np.asarray(with_window(image, grid, token, radius)).astype(int)
    side = px * grid.scale
    line = max(1, side // 8)
    seen = np.ones((grid.height, grid.width), bool) if radius is None else disc(grid.height, grid.width, token, radius)
    for place in np.ndindex(seen.shape):
        inner = tuple(slice(at * side + 2 * line, (at + 1) * side - 2 * line) for at in place)
        if seen[place]:
            assert (after[inner] == before[inner]).all(), place
        else:
            assert abs(after[inner] - (before[inner] * (1 - FADED) + 255 * FADED)).max() < 1, place
            whole = tuple(slice(at * side, (at + 1) * side) for at in place)
            assert abs(after[whole] - (before[whole] * (1 - FADED) + 255 * FADED)).max() < 1, "lines lie inside"
    top, left = token[0] * side, token[1] * side
    assert (after[top, left] == 255).all()
    assert (after[top + line, left + line] == QUERY).all()
    blue = (after == SEEN).all(-1)
    if radius is None or radius == 100:
        assert not blue.any(), "the image's own border is none of the window"
    elif radius == 3:
        assert blue[(token[0] - 2) * side, left], "along the upper edge of the disc"
