"""What masks should be, in NumPy and from the definitions alone: shares no code with ``flexclear.masks``.

Of a layout and a window only the fields are read (sizes, radii, parts), and the layout's choice of a token order, which
``sequence.check_order`` checks. Whole numbers are int64 throughout, so that nothing overflows at any size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexclear.masks import Both, Disc, Downsampled, Either, Full, Layout, Neighborhood, Square, Strided, Swin, Window

Numbers = NDArray[np.int64]
Truths = NDArray[np.bool_]

SIMPLE = (Disc, Square, Neighborhood, Swin, Strided, Full)


def knows(window: object) -> bool:
    """Whether the definition of ``window`` is written down here; not that of a subclass, which may be another."""
    if type(window) in (Both, Either):
        return all(map(knows, window.parts))  # type: ignore[attr-defined]
    if type(window) is Downsampled:
        return knows(window.window)
    return type(window) in SIMPLE


def sees(window: Window, layout: Layout, y_q: Numbers, x_q: Numbers, y_k: Numbers, x_k: Numbers) -> Truths:
    """Whether image queries see image keys, by the definition of the window; broadcast."""
    match window:
        case Disc(radius):
            return (y_q - y_k) ** 2 + (x_q - x_k) ** 2 < radius**2
        case Square(radius):
            return np.maximum(abs(y_q - y_k), abs(x_q - x_k)) < radius
        case Neighborhood(kernel):
            first_y = np.clip(y_q - kernel // 2, 0, layout.height - kernel)
            first_x = np.clip(x_q - kernel // 2, 0, layout.width - kernel)
            return (first_y <= y_k) & (y_k < first_y + kernel) & (first_x <= x_k) & (x_k < first_x + kernel)
        case Swin(side, shift):
            # Rolled back by the shift and cut into windows; what was rolled around is a window of its own, number -1.
            return ((y_q - shift) // side == (y_k - shift) // side) & ((x_q - shift) // side == (x_k - shift) // side)
        case Strided(stride):
            return ((y_q - y_k) % stride == 0) & ((x_q - x_k) % stride == 0)
        case Full():
            return np.ones(np.broadcast_shapes(y_q.shape, x_q.shape, y_k.shape, x_k.shape), dtype=bool)
        case Both():
            return np.logical_and.reduce([sees(part, layout, y_q, x_q, y_k, x_k) for part in window.parts])
        case Either():
            return np.logical_or.reduce([sees(part, layout, y_q, x_q, y_k, x_k) for part in window.parts])
        case Downsampled(inner, _):
            return sees(inner, layout, y_q, x_q, y_k, x_k)
    raise TypeError(f"the definition of {window!r} is not written down here")


def raster_places(layout: Layout) -> tuple[Numbers, Numbers]:
    """Row and column, each in its own grid, of every image token in raster order, grid after grid."""
    rows, columns = [], []
    for height, width in [(layout.height, layout.width), *layout.references]:
        y, x = np.divmod(np.arange(height * width, dtype=np.int64), width)
        rows.append(y)
        columns.append(x)
    return np.concatenate(rows), np.concatenate(columns)


def cell_counts(layout: Layout, window: object) -> tuple[int, int]:
    """Rows and columns of pooled keys: as many cells as begin on the grid."""
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
    y, x = (axis[order] for axis in raster_places(layout))
    text, image = layout.text_len, len(order)
    first = text if layout.text_first else 0
    rows, columns = cell_counts(layout, window)
    asked = np.arange(text + image) if queries is None else queries.numpy()
    found = np.ones((len(asked), text + image + rows * columns), dtype=bool)
    of_image = (asked >= first) & (asked < first + image)
    query = asked[of_image] - first
    found[of_image, first : first + image] = sees(window, layout, y[query, None], x[query, None], y[None], x[None])
    found[~of_image, text + image :] = False  # Text sees every token already.
    return torch.from_numpy(found)
