"""Warnings about windows that do not fit: references out of reach, more frames than a clip has."""

from __future__ import annotations

import warnings

import torch

from flexclear.masks import Layout, Tube, Window
from flexclear.masks.places import Box


def warn_of_unreached(layout: Layout, window: Window) -> None:
    """Warn of each reference grid that the image's far corner does not see.

    Windows depend on row and column, and every grid begins at row 0 and column 0. If the image is larger than a
    reference by the window's radius or more, its far side has no token of that reference in its window: information
    from the reference gets there only from token to token, layer by layer.

    Warns:
        UserWarning: for each such reference, naming both grids and the window.
    """

    def box(*intervals: tuple[int, int]) -> Box:
        frames, rows, columns = (
            (torch.tensor(first, dtype=torch.int32), torch.tensor(last, dtype=torch.int32)) for first, last in intervals
        )
        return frames, rows, columns

    height, width = layout.height, layout.width
    corner = box((0, 0), (height - 1, height - 1), (width - 1, width - 1))
    for rows, columns in layout.references:
        if not bool(window.touches(layout, corner, box((0, 0), (0, rows - 1), (0, columns - 1)))):
            warnings.warn(
                f"flexclear: a reference image of {rows} x {columns} tokens ends so far before the image's {height} x "
                f"{width} that the window {window.name} (radius or side in tokens) hides it from the image's far side. "
                "Use a reference of the image's size, or a larger r",
                stacklevel=2,
            )


def warn_of_depth(layout: Layout, window: Window) -> None:
    """Warn if a window covers more frames than the clip has: every query then sees all frames. Probably the number was meant in
    video frames, before the VAE.

    Warns:
        UserWarning: naming both numbers.
    """
    if not isinstance(window, Tube) or window.repeat_last or len(set(window.squared_radii)) != 1:
        return
    depth = len(window.squared_radii) - 1
    if 1 < layout.frames <= depth:
        warnings.warn(
            f"flexclear: frame_radius={depth}, and this clip has {layout.frames} frames of latents: every query sees all of "
            f"them. frame_radius counts frames after the VAE; 'all' means all",
            stacklevel=2,
        )
