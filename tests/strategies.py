"""What the property tests draw from: layouts over rectangles, both orders, text first and last, odd block sizes."""

from __future__ import annotations

from hypothesis import strategies as st

from flexclear.masks import Both, Disc, Downsampled, Either, Full, Layout, Neighborhood, Square, Strided, Swin

sides = st.integers(1, 40)
text_lens = st.sampled_from([0, 1, 5, 16, 31, 64, 77])
orders = st.sampled_from(["raster", "tiled"])
radii = st.integers(1, 14)
block_sizes = st.sampled_from([16, 32, 64, (32, 16), (128, 64), (64, 128), (16, 48)])


@st.composite
def layouts(draw, side=sides):
    return Layout(draw(side), draw(side), draw(text_lens), draw(st.booleans()), draw(orders))


discs = st.builds(Disc, radii)


def simple_windows(layout):
    """Windows that fit the layout."""
    kernels = st.integers(1, min(layout.height, layout.width, 12))
    sizes = st.integers(1, 12)
    return st.one_of(
        discs,
        st.builds(Square, radii),
        st.builds(Neighborhood, kernels),
        sizes.flatmap(lambda size: st.builds(Swin, st.just(size), st.integers(0, size - 1))),
        st.builds(Strided, st.integers(1, 6)),
        st.just(Full()),
    )


def windows(layout):
    """Windows, compositions and pooled keys that fit the layout."""
    simple = simple_windows(layout)
    composed = st.one_of(simple, st.builds(Both, simple, simple), st.builds(Either, simple, simple, simple))
    return st.one_of(composed, st.builds(Downsampled, composed, st.integers(1, 5)))


@st.composite
def layouts_with_windows(draw, side=sides):
    layout = draw(layouts(side))
    return layout, draw(windows(layout))
