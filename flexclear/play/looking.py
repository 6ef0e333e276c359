"""A token's window drawn over an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from flexclear.masks import Disc, Layout
from flexclear.masks.pictures import QUERY, SEEN, UNSEEN, window_picture

LEAST_SIDE = 512
"""Minimum pixels of an image's longer side on the page."""

FADED = 0.72
"""Opacity of the white over tokens that are not seen."""

Place = tuple[int, int]
"""Row and column of a token."""


@dataclass(frozen=True)
class Grid:
    """An image on the page and the tokens that it consists of.

    Attributes:
        height, width: in tokens.
        px: side of a token in pixels of the image.
        scale: pixels on the page per image pixel, along either side.
    """

    height: int
    width: int
    px: int
    scale: int

    @classmethod
    def of(cls, image: Image.Image, layout: Layout) -> Grid | None:
        """The grid of an image with the tokens of ``layout``; None if they do not cover it as squares."""
        px = image.height // layout.height
        if (layout.height * px, layout.width * px) != (image.height, image.width):
            return None
        return cls(layout.height, layout.width, px, scale_of(image))

    def token_at(self, x: int, y: int) -> Place:
        """The token at a pixel of the image on the page, counted from the upper left corner."""
        side = self.px * self.scale
        return min(max(y // side, 0), self.height - 1), min(max(x // side, 0), self.width - 1)


def scale_of(image: Image.Image) -> int:
    """Pixels on the page per image pixel."""
    return max(1, -(-LEAST_SIDE // max(image.size)))


def shown(image: Image.Image) -> Image.Image:
    """The image at its size on the page."""
    size = (image.width * scale_of(image), image.height * scale_of(image))
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def seen_from(grid: Grid, token: Place, radius: int) -> np.ndarray:
    """Which image tokens a token sees through a disc, bool ``[height, width]``; itself is one of them."""
    picture = window_picture(Layout(grid.height, grid.width), Disc(radius), token)
    return (picture != torch.tensor(UNSEEN, dtype=torch.uint8)).any(-1).numpy()


def with_window(image: Image.Image, grid: Grid, token: Place, radius: int | None) -> Image.Image:
    """Draw what a token sees: the token in red, a blue line around its window, the rest of the image faded.

    Args:
        image: the image as it was drawn.
        grid: the image's grid.
        token: row and column of the query.
        radius: its window's radius in tokens; None: dense attention, which sees everything.
    """
    pixels = np.array(shown(image))
    side = grid.px * grid.scale
    line = max(1, side // 8)
    if radius is not None:
        inside = np.kron(seen_from(grid, token, radius), np.ones((side, side), bool))
        whole = pixels[: inside.shape[0], : inside.shape[1]]
        whole[~inside] = (whole[~inside] * (1 - FADED) + 255 * FADED).astype(np.uint8)
        whole[inside & ~_shrunk(inside, line)] = SEEN
    top, left = token[0] * side, token[1] * side
    for inner, colour in ((0, (255, 255, 255)), (line, QUERY)):  # Visible on any color of the image.
        square = pixels[top + inner : top + side - inner, left + inner : left + side - inner]
        rim = np.ones(square.shape[:2], bool)
        rim[line:-line, line:-line] = False
        square[rim] = colour
    return Image.fromarray(pixels)


def _shrunk(inside: np.ndarray, by: int) -> np.ndarray:
    """Shrink an area by this many pixels along its border. The image's edge does not count as a border."""
    padded = np.pad(inside, by, constant_values=True)
    left = inside.copy()
    height, width = inside.shape
    for dy in (0, by, 2 * by):
        for dx in (0, by, 2 * by):
            left &= padded[dy : dy + height, dx : dx + width]
    return left
