"""Recognize which emoji and background a generated image shows, by comparison with clean drawings.

A clean drawing is ``T = a E + (1 - a) b``: emoji colors E and coverage a, moved, scaled and possibly mirrored, over a flat
background b. Correlation gives the squared distance to an image for every position at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from flexclear.embedded.scenes import LARGEST_EMOJI, SCENE_PIXELS, SMALLEST_EMOJI, Colour, scale_bitmap

WORKING_PIXELS = 64
"""Images are compared at this size."""
TEMPLATE_SIZES = tuple(range(SMALLEST_EMOJI, LARGEST_EMOJI + 1, 4))
"""Emoji sizes searched, in pixels of the 128-pixel canvas."""
BORDER = 3
"""Width, in working pixels, of the frame whose median colour is taken as the background."""


@dataclass(frozen=True)
class Match:
    """What an image shows.

    Attributes:
        emoji: index of the emoji with the nearest clean drawing.
        background: index of the nearest background colour.
        error: mean squared difference to that drawing, for values 0 to 1.
        runner_up: index of the second nearest emoji.
        runner_up_error: mean squared difference to that emoji's nearest drawing.
    """

    emoji: int
    background: int
    error: float
    runner_up: int
    runner_up_error: float


class Retriever:
    """Finds the nearest clean drawing over all emoji, places, several sizes and both mirrorings."""

    def __init__(self, bitmaps: Sequence[Image.Image], colours: Sequence[Colour]) -> None:
        """Prepare the templates.

        Args:
            bitmaps: one RGBA image per emoji index; at least two.
            colours: RGB values, 0 to 255, per background index.
        """
        if len(bitmaps) < 2 or not colours:
            raise ValueError(f"retrieval needs two emoji and one background, got {len(bitmaps)} and {len(colours)}")
        self._emoji_count = len(bitmaps)
        self._colours = torch.tensor(colours, dtype=torch.float32) / 255
        variants = [(size, flipped) for size in TEMPLATE_SIZES for flipped in (False, True)]
        self._variants = len(variants)
        templates = torch.stack([_template(b, size, flip) for b in bitmaps for size, flip in variants])
        coverage, painted = templates[:, 3], templates[:, :3] * templates[:, 3:]
        self._spectra = torch.fft.rfft2(torch.cat([painted, coverage[:, None]], dim=1)).conj()
        self._painted_energy = painted.square().sum((1, 2, 3))
        self._painted_by_coverage = (painted * coverage[:, None]).sum((2, 3))
        self._coverage_energy = coverage.square().sum((1, 2))
        self._allowed = torch.stack([_allowed_places(size) for _ in bitmaps for size, _ in variants])

    def match(self, pictures: torch.Tensor) -> list[Match]:
        """Return what each image shows.

        Args:
            pictures: shape (images, 3, side, side), values 0 to 1, side a multiple of 64.

        Raises:
            ValueError: the shape is different.
        """
        _, channels, height, width = pictures.shape
        if channels != 3 or height != width or height % WORKING_PIXELS:
            raise ValueError(
                f"images must have shape (count, 3, side, side) with side a multiple of {WORKING_PIXELS}, "
                f"got {tuple(pictures.shape)}"
            )
        small = F.adaptive_avg_pool2d(pictures.float().clamp(0, 1).cpu(), WORKING_PIXELS)
        return [self._match_one(picture) for picture in small]

    def _match_one(self, picture: torch.Tensor) -> Match:
        frame = torch.ones(picture.shape[1:], dtype=torch.bool)
        frame[BORDER:-BORDER, BORDER:-BORDER] = False
        seen = picture[:, frame].median(dim=1).values
        background = int((self._colours - seen).square().sum(1).argmin())
        colour = self._colours[background]
        difference = picture - colour[:, None, None]
        against_background = -(difference * colour[:, None, None]).sum(0, keepdim=True)
        spectrum = torch.fft.rfft2(torch.cat([difference, against_background]))
        agreement = torch.fft.irfft2((self._spectra * spectrum).sum(1), s=picture.shape[1:])
        template_energy = (
            self._painted_energy
            - 2 * self._painted_by_coverage @ colour
            + self._coverage_energy * colour.square().sum()
        )
        distances = difference.square().sum() - 2 * agreement + template_energy[:, None, None]
        nearest = distances.masked_fill(~self._allowed, torch.inf).amin((1, 2))
        errors = nearest.view(self._emoji_count, self._variants).amin(1) / picture.numel()
        best = errors.topk(2, largest=False)
        first, second = best.indices.tolist()
        error, runner_up_error = best.values.clamp_min(0).tolist()
        return Match(first, background, error, second, runner_up_error)


def _template(bitmap: Image.Image, size: int, flipped: bool) -> torch.Tensor:
    """Return RGBA of shape (4, 64, 64), 0 to 1, not premultiplied, the emoji in the top left corner."""
    canvas = Image.new("RGBA", (SCENE_PIXELS, SCENE_PIXELS), (0, 0, 0, 0))
    canvas.paste(scale_bitmap(bitmap, size, flipped), (0, 0))
    reduced = canvas.convert("RGBa").reduce(SCENE_PIXELS // WORKING_PIXELS).convert("RGBA")
    return torch.from_numpy(np.asarray(reduced).copy()).permute(2, 0, 1).float() / 255


def _allowed_places(size: int) -> torch.Tensor:
    """Return which top left corners keep an emoji of this size inside the image, shape (64, 64)."""
    room = (SCENE_PIXELS - size) * WORKING_PIXELS // SCENE_PIXELS
    allowed = torch.zeros(WORKING_PIXELS, WORKING_PIXELS, dtype=torch.bool)
    allowed[: room + 1, : room + 1] = True
    return allowed
