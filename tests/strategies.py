"""What the property tests draw from: layouts over rectangles, both orders, text first and last, odd block sizes."""

from __future__ import annotations

from hypothesis import strategies as st

from flexclear.masks import Disc, Layout

sides = st.integers(1, 40)
text_lens = st.sampled_from([0, 1, 5, 16, 31, 64, 77])
orders = st.sampled_from(["raster", "tiled"])
radii = st.integers(1, 14)
block_sizes = st.sampled_from([16, 32, 64, (32, 16), (128, 64), (64, 128), (16, 48)])


@st.composite
def layouts(draw, side=sides):
    return Layout(draw(side), draw(side), draw(text_lens), draw(st.booleans()), draw(orders))


discs = st.builds(Disc, radii)
