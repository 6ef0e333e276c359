"""Hypothesis strategies: layouts, windows that fit them, radii, block sizes, dtypes.

Layouts are rectangles of any sides, in both orders, with text first or last and of lengths that no block divides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from flexclear.masks import Both, Disc, Downsampled, Either, Full, Layout, Neighborhood, Square, Strided, Swin, Window
from flexclear.masks.layout import ORDERS

sides = st.integers(1, 40)
text_lens = st.sampled_from([0, 1, 5, 16, 31, 64, 77])
orders = st.sampled_from(sorted(ORDERS))
radii = st.integers(1, 14)
block_sizes: st.SearchStrategy[int | tuple[int, int]] = st.sampled_from(
    [16, 32, 64, (32, 16), (128, 64), (64, 128), (16, 48)]
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])

KINDS = ("disc", "square", "neighborhood", "swin", "strided", "full", "both", "either", "downsampled")
"""Names of the windows that ``windows`` draws."""


@st.composite
def layouts(draw: st.DrawFn, side: st.SearchStrategy[int] = sides, most_references: int = 0) -> Layout:
    """Layouts with sides drawn from ``side`` and up to ``most_references`` reference grids."""
    references = tuple(draw(st.lists(st.tuples(side, side), max_size=most_references)))
    return Layout(draw(side), draw(side), draw(text_lens), draw(st.booleans()), draw(orders), references)


def windows_on_several_grids() -> st.SearchStrategy[Window]:
    """Windows that have a meaning on layouts with reference grids."""
    sizes = st.integers(1, 12)
    simple: st.SearchStrategy[Window] = st.one_of(
        discs,
        st.builds(Square, radii),
        sizes.flatmap(lambda size: st.builds(Swin, st.just(size), st.integers(0, size - 1))),
        st.builds(Strided, st.integers(1, 6)),
        st.just(Full()),
    )
    return st.one_of(simple, st.builds(Both, simple, simple), st.builds(Either, simple, simple))


discs = st.builds(Disc, radii)


def _by_kind(layout: Layout) -> dict[str, st.SearchStrategy[Window]]:
    sizes = st.integers(1, 12)
    return {
        "disc": discs,
        "square": st.builds(Square, radii),
        "neighborhood": st.builds(Neighborhood, st.integers(1, min(layout.height, layout.width, 12))),
        "swin": sizes.flatmap(lambda size: st.builds(Swin, st.just(size), st.integers(0, size - 1))),
        "strided": st.builds(Strided, st.integers(1, 6)),
        "full": st.just(Full()),
    }


def simple_windows(layout: Layout) -> st.SearchStrategy[Window]:
    """Windows that fit the layout, neither composed nor with pooled keys."""
    return st.one_of(*_by_kind(layout).values())


def windows(layout: Layout, kinds: Sequence[str] = KINDS) -> st.SearchStrategy[Window]:
    """Windows of the given kinds that fit the layout; see ``KINDS``.

    Raises:
        ValueError: a kind is unknown.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds of windows are {', '.join(KINDS)}; got {', '.join(unknown) or 'none'}")
    simple = simple_windows(layout)
    composed = {
        "both": st.builds(Both, simple, simple),
        "either": st.builds(Either, simple, simple, simple),
    }
    inner = st.one_of(simple, *composed.values())
    known = {**_by_kind(layout), **composed, "downsampled": st.builds(Downsampled, inner, st.integers(1, 5))}
    return st.one_of(*(known[kind] for kind in kinds))


@st.composite
def layouts_with_windows(
    draw: st.DrawFn, side: st.SearchStrategy[int] = sides, kinds: Sequence[str] = KINDS
) -> tuple[Layout, Window]:
    """A layout and a window that fits it."""
    layout = draw(layouts(side))
    return layout, draw(windows(layout, kinds))
