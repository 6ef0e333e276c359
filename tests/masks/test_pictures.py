"""Images show what the masks are."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

import flexclear
from flexclear.explanation.window import resolution_table
from flexclear.masks import Disc, Layout, Swin, block_pairs, dense_mask
from flexclear.masks.pictures import FULL, PARTIAL, QUERY, SEEN, SKIPPED, block_picture, window_picture


def pixels(picture, colour):
    return (picture == torch.tensor(colour, dtype=torch.uint8)).all(-1)


@pytest.mark.parametrize("window", [Disc(4), Swin(5, 2)])
@pytest.mark.parametrize("query", [(0, 0), (6, 11), None])
def test_a_window_picture_shows_the_row_of_the_dense_mask(window, query):
    layout = Layout(9, 14, text_len=0, order="raster")
    picture = window_picture(layout, window, query)
    row, column = query or (4, 7)
    seen = dense_mask(layout, window)[row * 14 + column].view(9, 14)
    assert pixels(picture, QUERY).nonzero().tolist() == [[row, column]]
    assert torch.equal(pixels(picture, SEEN) | pixels(picture, QUERY), seen)


def test_a_query_off_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"on the grid of 9 x 14, got \(9, 0\)"):
        window_picture(Layout(9, 14), Disc(4), (9, 0))


def test_a_block_picture_counts_as_the_blocks_do():
    pairs = block_pairs(Layout(32, 48, 128), Disc(9))
    picture = block_picture(pairs)
    counts = [int(pixels(picture, colour).sum()) for colour in (FULL, PARTIAL, SKIPPED)]
    assert counts == [pairs.full_count, pairs.partial_count, pairs.skipped_count]


def test_an_explanation_is_drawn(tmp_path):
    path = flexclear.explain(512, 768, r=8).save(tmp_path / "new" / "explained.png")
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 6


def test_the_resolution_table_holds_the_published_arithmetic_and_the_size_from_which_there_is_a_gain():
    table = resolution_table(16)
    for gflops in ("86.6", "352.6", "1433.2", "5789.2"):
        assert f"| {gflops} |" in table
    tokens = int(re.search(r"\((\d+) x \d+ tokens\)", table)[1])
    assert flexclear.explain(tokens * 16, tokens * 16, 16).layer.gain >= 1
    assert flexclear.explain(tokens * 16 - 16, tokens * 16 - 16, 16).layer.gain < 1
    assert f"Below about {tokens * 16} x {tokens * 16} px dense attention is as fast or faster" in table
