"""The correct masks, in NumPy and from the definitions alone. Shares no code with ``flexclear.masks``.

Of a layout and a window, only the fields are read (sizes, radii, parts), and the layout's choice of a token order, which
``sequence.check_order`` checks. Integers are int64 throughout, so that nothing overflows at any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
)

Numbers = NDArray[np.int64]
Truths = NDArray[np.bool_]

Places = tuple[Numbers, Numbers, Numbers]
"""Frame, row and column."""

SIMPLE = (Disc, Square, Neighborhood, Swin, Strided, Full, Tube, TileWindow, Anchors)


def knows(window: object) -> bool:
    """Whether ``window`` has a definition here. Subclasses do not, since theirs may differ."""
    if type(window) in (Both, Either):
        return all(map(knows, window.parts))  # type: ignore[attr-defined]
    if type(window) is Downsampled:
        return knows(window.window)
    return type(window) in SIMPLE


def sees(window: Window, layout: Layout, query: Places, key: Places) -> Truths:
    """Whether image queries see image keys by the definition of the window. Broadcasts."""
    (t_q, y_q, x_q), (t_k, y_k, x_k) = query, key
    match window:
        case Disc(radius):
            return (y_q - y_k) ** 2 + (x_q - x_k) ** 2 < radius**2
        case Tube(squares, on):
            away = abs(t_q - t_k)
            seen = np.array([*squares, squares[-1] if on else 0], dtype=np.int64)[np.minimum(away, len(squares))]
            return (y_q - y_k) ** 2 + (x_q - x_k) ** 2 < seen
        case Square(radius, 1, 1):
            axes = _each_axis(layout, radius)
            return np.logical_and.reduce(
                np.broadcast_arrays(*(abs(query[axis] - key[axis]) < r for axis, _, r in axes))
            )
        case Square(radius, stride, dilation):
            width = 2 * radius - 1 if isinstance(radius, int) else tuple(2 * r - 1 for r in radius)
            return _neighbours(layout, query, key, width, stride, dilation, shifted=False)
        case Neighborhood(kernel, stride, dilation):
            return _neighbours(layout, query, key, kernel, stride, dilation, shifted=True)
        case TileWindow(tile, tiles):
            seen = np.ones((), dtype=bool)
            for axis, side, size, count in _each_axis(layout, tile, tiles):
                cells = range(-(-side // size))
                # The run of this many tiles whose middle is the query's own tile, or the nearest one at the border.
                middle = np.clip(query[axis] // size, count // 2, max(len(cells) - 1 - count // 2, count // 2))
                seen = seen & (abs(key[axis] // size - middle) <= count // 2)
            return seen & (y_q == y_q) & (y_k == y_k)
        case Anchors(frames):
            return np.isin(t_k, frames) & (t_q == t_q)
        case Swin(side, shift):
            # Rolled back by the shift and cut into windows. What wraps around is a separate window, number -1.
            return ((y_q - shift) // side == (y_k - shift) // side) & ((x_q - shift) // side == (x_k - shift) // side)
        case Strided(stride):
            return ((y_q - y_k) % stride == 0) & ((x_q - x_k) % stride == 0)
        case Full():
            return np.ones(np.broadcast_shapes(*(axis.shape for axis in (*query, *key))), dtype=bool)
        case Both():
            return np.logical_and.reduce([sees(part, layout, query, key) for part in window.parts])
        case Either():
            return np.logical_or.reduce([sees(part, layout, query, key) for part in window.parts])
        case Downsampled(inner, _):
            return sees(inner, layout, query, key)
    raise TypeError(f"the definition of {window!r} is not written down here")


def _each_axis(layout: Layout, *given: int | tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Number and side of each axis that a window's numbers refer to, and these numbers."""
    sides = (layout.frames, layout.height, layout.width)
    tuples = [len(numbers) for numbers in given if not isinstance(numbers, int)]
    axes = range(3 - tuples[0], 3) if tuples else range(0 if layout.frames > 1 else 1, 3)
    for place, axis in enumerate(axes):
        yield axis, sides[axis], *(numbers if isinstance(numbers, int) else numbers[place] for numbers in given)


def _neighbours(
    layout: Layout,
    query: Places,
    key: Places,
    width: int | tuple[int, ...],
    stride: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    *,
    shifted: bool,
) -> Truths:
    """NATTEN's neighborhoods along one axis: for every place on the axis, the list of places that it sees."""
    seen = np.ones((), dtype=bool)
    for axis, side, keys, step, phases in _each_axis(layout, width, stride, dilation):
        table = np.zeros((side, side), dtype=bool)
        for phase in range(min(phases, side)):
            own = np.arange(phase, side, phases)
            for number, place in enumerate(own):
                middle = min(number - number % step + step // 2, len(own) - 1)
                first = middle - keys // 2
                if shifted:
                    first = min(max(first, 0), len(own) - keys)
                table[place, own[max(first, 0) : max(first + keys, 0)]] = True
        seen = seen & table[query[axis], key[axis]]
    return seen


def raster_places(layout: Layout) -> Places:
    """Frame, row and column within its own grid of every image token, in raster order, grid after grid."""
    grids: list[Places] = []
    for height, width in [(layout.height, layout.width), *layout.references]:
        place, x = np.divmod(np.arange(layout.frames * height * width, dtype=np.int64), width)
        t, y = np.divmod(place, height)
        grids.append((t, y, x))
    return _places(np.concatenate(axis) for axis in zip(*grids, strict=True))


def _places(axes: Iterable[Numbers]) -> Places:
    frame, row, column = axes
    return frame, row, column


def cell_counts(layout: Layout, window: object) -> tuple[int, int]:
    """Rows and columns of pooled keys: the number of cells that begin on the grid."""
    if not isinstance(window, Downsampled):
        return 0, 0
    return len(range(0, layout.height, window.factor)), len(range(0, layout.width, window.factor))


def expected_rows(layout: Layout, window: Window, queries: Tensor | None = None) -> Tensor:
    """Which keys some queries may see, bool ``[queries, keys]`` in sequence order.

    Args:
        layout, window: the case; the window must be known, see ``knows``.
        queries: sequence positions; all of them by default.
    """
    order = layout.permutation().numpy()
    places = [axis[order] for axis in raster_places(layout)]
    text, image = layout.text_len, len(order)
    first = text if layout.text_first else 0
    rows, columns = cell_counts(layout, window)
    asked = np.arange(text + image) if queries is None else queries.numpy()
    found = np.ones((len(asked), text + image + rows * columns), dtype=bool)
    of_image = (asked >= first) & (asked < first + image)
    query = asked[of_image] - first
    found[of_image, first : first + image] = sees(
        window, layout, _places(axis[query, None] for axis in places), _places(axis[None] for axis in places)
    )
    found[~of_image, text + image :] = False  # Text sees every token already.
    return torch.from_numpy(found)
