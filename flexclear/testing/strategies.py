"""Hypothesis strategies: layouts, windows that fit them, radii, block sizes, dtypes.

Layouts are rectangles with any sides, in both orders, with text first or last, text lengths that no block divides, and
reference grids if requested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st

from flexclear.masks import (
    Anchors,
    Both,
    Disc,
    Downsampled,
    Either,
    Full,
    Layout,
    Neighborhood,
    Square,
    Strided,
    Swin,
    TileWindow,
    Tube,
    Window,
    all_frames,
    ball,
    cylinder,
    radial,
)
from flexclear.masks.layout import MAX_SIDE
from flexclear.masks.orders import ORDERS

sides = st.integers(1, 40)
narrow = st.integers(1, 3)
"""Sides of strips, on which block spans often equal a radius."""

text_lens = st.sampled_from([0, 1, 5, 16, 31, 64, 77])
orders = st.sampled_from(sorted(ORDERS))
radii = st.integers(1, 14)
block_sizes: st.SearchStrategy[int | tuple[int, int]] = st.sampled_from(
    [16, 32, 64, (32, 16), (128, 64), (64, 128), (16, 48)]
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])

KINDS = (
    "disc", "square", "neighborhood", "swin", "strided", "full", "tube", "tilewindow", "anchors", "both", "either", "downsampled",
)  # fmt: skip
"""Names of the windows that ``windows`` draws."""

ON_ONE_GRID = ("neighborhood", "tilewindow", "downsampled")
"""Windows that have no meaning on layouts with reference grids."""

OF_IMAGES = ("disc", "swin", "strided", "downsampled")
"""Windows that have no meaning on layouts with several frames."""


@st.composite
def layouts(draw: st.DrawFn, side: st.SearchStrategy[int] = sides, most_references: int = 0) -> Layout:
    """Layouts with sides drawn from ``side`` and up to ``most_references`` reference grids."""
    references = tuple(draw(st.lists(st.tuples(side, side), max_size=most_references)))
    return Layout(draw(side), draw(side), draw(text_lens), draw(st.booleans()), draw(orders), references)


@st.composite
def clips(draw: st.DrawFn) -> Layout:
    """Layouts of several frames with sides of up to 16 tokens, in raster order, in bands of any size, or chosen for a window."""
    count, height, width = draw(st.integers(2, 9)), draw(st.integers(1, 14)), draw(st.integers(1, 16))
    bands = st.tuples(st.integers(1, count), st.integers(1, height + 1))
    order = draw(orders | bands)
    return Layout(height, width, draw(text_lens), draw(st.booleans()), order, frames=count)


@st.composite
def long_layouts(draw: st.DrawFn, most_references: int = 0) -> Layout:
    """Layouts with sides of 41 to 400 and 1 to 12 tokens, so that radii and distances can be large."""
    grids = draw(
        st.lists(st.tuples(st.integers(1, 12), st.integers(41, 400)), min_size=1, max_size=1 + most_references)
    )
    (height, width), *references = [grid[::-1] if draw(st.booleans()) else grid for grid in grids]
    return Layout(height, width, draw(text_lens), draw(st.booleans()), draw(orders), tuple(references))


@st.composite
def large_layouts(draw: st.DrawFn, tokens: int) -> Layout:
    """Layouts of ``tokens`` or slightly more image tokens, from long strips to squares, and 1 to 512 text tokens."""
    height = draw(st.integers(-(-tokens // MAX_SIDE), int(tokens**0.5) + 1))
    width = -(-tokens // height)
    sides = (width, height) if draw(st.booleans()) else (height, width)
    return Layout(*sides, draw(st.sampled_from([77, 1, 16, 512])), draw(st.booleans()), draw(orders))


def _by_kind(layout: Layout) -> dict[str, st.SearchStrategy[Window]]:
    """Windows that are not compositions, small ones and some that are as large as the layout."""
    side, longest = min(layout.height, layout.width), max(map(max, layout.grids))

    def up_to(usual: int, most: int) -> st.SearchStrategy[int]:
        return st.integers(1, usual) | st.integers(1, max(usual, most))

    swin_sides = up_to(12, longest)
    kinds: dict[str, st.SearchStrategy[Window]] = {
        "disc": st.builds(Disc, up_to(14, 3 * longest // 2)),
        "square": st.builds(Square, up_to(14, longest)),
        "neighborhood": st.builds(
            Neighborhood, up_to(min(side, 12), min(side, layout.frames if layout.frames > 1 else side))
        ),
        "swin": swin_sides.flatmap(lambda size: st.builds(Swin, st.just(size), st.integers(0, size - 1))),
        "strided": st.builds(Strided, up_to(6, longest)),
        "full": st.just(Full()),
        "tube": tubes(longest),
        "tilewindow": st.builds(TileWindow, st.integers(1, 9), st.sampled_from([1, 3, 5])),
        "anchors": st.lists(st.integers(0, layout.frames - 1), min_size=1, unique=True).map(
            lambda some: Anchors(tuple(some))
        ),
    }
    if not layout.references:
        kinds["square"] |= _stepped(layout, Square)
        kinds["neighborhood"] |= _stepped(layout, Neighborhood)
        kinds["tilewindow"] |= _tiles(layout)
    if layout.frames > 1:
        kinds["neighborhood"] = _stepped(layout, Neighborhood)
    without = (*ON_ONE_GRID * bool(layout.references), *OF_IMAGES * (layout.frames > 1))
    return {kind: strategy for kind, strategy in kinds.items() if kind not in without}


@st.composite
def tubes(draw: st.DrawFn, longest: int = 16) -> Tube:
    """Tubes made in each possible way."""
    r, frames = draw(st.integers(1, 9) | st.integers(1, 3 * longest // 2)), draw(st.integers(0, 6))
    squares = draw(st.lists(st.integers(1, 2 * longest**2), min_size=1, max_size=5))
    kinds = (
        lambda: cylinder(r, frames),
        lambda: all_frames(r),
        lambda: ball(r, frames + 1),
        lambda: radial(r),
        lambda: Tube(tuple(sorted(squares, reverse=True)), draw(st.booleans())),
    )
    return draw(st.sampled_from(kinds))()


@st.composite
def _stepped(draw: st.DrawFn, layout: Layout, kind: Callable[..., Window]) -> Window:
    """Squares and neighborhoods with a different size, stride and dilation along each axis."""
    sides = layout.shape if layout.frames > 1 else layout.shape[1:]
    dilation = tuple(draw(st.integers(1, min(3, side))) for side in sides)
    most = [side // phases for side, phases in zip(sides, dilation, strict=True)]
    size = tuple(draw(st.integers(1, min(count, 9))) for count in most)
    widest = [2 * n - 1 for n in size] if kind is Square else size
    stride = tuple(draw(st.integers(1, keys)) for keys in widest)
    return kind(size, stride, dilation)


@st.composite
def _tiles(draw: st.DrawFn, layout: Layout) -> Window:
    count = len(layout.shape if layout.frames > 1 else layout.shape[1:])
    tile, window = (tuple(draw(each) for _ in range(count)) for each in (st.integers(1, 6), st.sampled_from([1, 3, 5])))
    return TileWindow(tile, window)


def simple_windows(layout: Layout) -> st.SearchStrategy[Window]:
    """Windows that fit the layout, without compositions and pooled keys."""
    return st.one_of(*_by_kind(layout).values())


def windows(layout: Layout, kinds: Sequence[str] = KINDS) -> st.SearchStrategy[Window]:
    """Windows of the given kinds that fit the layout; see ``KINDS``. Leaves out ``ON_ONE_GRID`` on reference grids, and
    ``OF_IMAGES`` on several frames.

    Raises:
        ValueError: a kind is unknown, or none fits the layout.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds of windows are {', '.join(KINDS)}; got {', '.join(unknown) or 'none'}")
    simple = simple_windows(layout)
    composed: dict[str, st.SearchStrategy[Window]] = {
        "both": st.builds(Both, simple, simple),
        "either": st.builds(Either, simple, simple, simple),
    }
    known = {**_by_kind(layout), **composed}
    if not layout.references and layout.frames == 1:
        known["downsampled"] = st.builds(Downsampled, st.one_of(simple, *composed.values()), st.integers(1, 5))
    fitting = [known[kind] for kind in kinds if kind in known]
    if not fitting:
        raise ValueError(
            f"windows of kind {', '.join(kinds)} do not fit a layout of {layout.frames} frames and "
            f"{len(layout.references)} references"
        )
    return st.one_of(fitting)


@st.composite
def layouts_with_windows(
    draw: st.DrawFn,
    side: st.SearchStrategy[int] = sides,
    kinds: Sequence[str] = KINDS,
    most_references: int = 0,
) -> tuple[Layout, Window]:
    """A layout and a window that fits it."""
    layout = draw(layouts(side, most_references))
    return layout, draw(windows(layout, kinds))
