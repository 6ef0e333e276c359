"""Windows over the frames of a video: a disc in each frame, whose radius depends on the distance in time."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexclear.masks.checks import check_int
from flexclear.masks.coordinates import Number, Reads
from flexclear.masks.layout import MAX_CLIP_SIDE, MAX_SIDE, Layout
from flexclear.masks.places import Box, Coordinates, gap, span
from flexclear.masks.shapes import MAX_FLOAT_RADIUS, offset_pairs
from flexclear.masks.windows import Rule, Window

MAX_SQUARE = (2 * MAX_SIDE) ** 2
"""Beyond the largest diagonal, every radius gives the same window."""

FEWEST_STEPS = 4
"""Minimum number of distances in time at which radii that follow no formula may change."""


@dataclass(frozen=True)
class Tube(Window):
    r"""A disc in each frame, around the query's own place.

    .. math:: (y_q - y_k)^2 + (x_q - x_k)^2 < R_{|t_q - t_k|}

    where R is ``squared_radii``. Frames further away are not seen, or are seen with the last radius (``repeat_last``). Over an
    image, which has one frame, it is ``Disc``. ``cylinder``, ``all_frames``, ``ball`` and ``radial`` make the usual ones.

    >>> Tube((256, 256, 64))                            # radius 16 in its own frame and the next, 8 in the one after
    Tube(squared_radii=(256, 256, 64), repeat_last=False)

    Args:
        squared_radii: R of frames 0, 1, 2 ... away, in tokens squared: whole numbers of 1 or more, never increasing. The
            inequality is strict, so 1 is the same place alone.
        repeat_last: whether frames further away are seen with the last radius.

    Raises:
        TypeError: ``squared_radii`` is not a tuple of ints, or ``repeat_last`` is not a bool.
        ValueError: there are none, one is out of range, or they increase.
    """

    squared_radii: tuple[int, ...]
    repeat_last: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.squared_radii, tuple):
            raise TypeError(f"Tube squared_radii must be a tuple of ints, got {self.squared_radii!r}")
        if not isinstance(self.repeat_last, bool):
            raise TypeError(f"Tube repeat_last must be True or False, got {self.repeat_last!r}")
        if not 1 <= len(self.squared_radii) <= MAX_CLIP_SIDE:
            raise ValueError(f"Tube needs 1 to {MAX_CLIP_SIDE} squared_radii, got {len(self.squared_radii)}")
        for away, square in enumerate(self.squared_radii):
            check_int(f"Tube squared radius {away} frames away", square, 1, MAX_SQUARE, "in tokens squared")
        if any(later > sooner for sooner, later in zip(self.squared_radii, self.squared_radii[1:], strict=False)):
            raise ValueError(
                f"Tube squared_radii must never increase with the distance in time, got {self.squared_radii}"
            )

    @property
    def name(self) -> str:
        first, last = self.squared_radii[0], self.squared_radii[-1]
        if first == last:
            end = "all_frames" if self.repeat_last else f"t{len(self.squared_radii) - 1}"
            return f"tube_{_radius(first)}_{end}"
        return f"tube_{_radius(first)}_to_{_radius(last)}_t{len(self.squared_radii) - 1}{'_on' * self.repeat_last}"

    @property
    def knows_frames(self) -> bool:
        return True

    @property
    def reads(self) -> Reads:
        # Sums of squares below 2^24 are exact in float32, and larger ones are not rounded below it.
        return "offsets" if self.squared_radii[0] <= MAX_FLOAT_RADIUS**2 else "integers"

    @property
    def reach(self) -> int:
        return math.isqrt(self.squared_radii[0] - 1) + 1

    @property
    def frame_radius(self) -> int | None:
        """How many frames away the last seen frame is; None: all are seen."""
        return None if self.repeat_last else len(self.squared_radii) - 1

    def squares(self, frames: int) -> list[int]:
        """R for 0 to ``frames`` - 1 frames away; 0 where nothing is seen."""
        beyond = self.squared_radii[-1] if self.repeat_last else 0
        return [*self.squared_radii[:frames], *[beyond] * (frames - len(self.squared_radii))]

    def rule(self, layout: Layout, number: Number) -> Rule:
        squares = self.squares(layout.frames)
        first = number(squares[0])
        if layout.frames == 1:
            return lambda query, key: _square(query, key) < first
        fall, depth = squares[0] - squares[1], sum(square > 0 for square in squares)
        if squares[1] == 0:
            fall = 0
        if any(square != squares[0] - fall * away**2 for away, square in enumerate(squares[:depth])):
            return self._in_steps(squares, number)
        # Frames beyond the last one seen are excluded by their distance; MAX_CLIP_SIDE if the clip has no such frames.
        per_frame, frames = number(fall), number(depth if depth < layout.frames else MAX_CLIP_SIDE)

        def inside(query: Coordinates, key: Coordinates) -> Tensor:
            away = (query[0] - key[0]).abs()
            return (_square(query, key) + per_frame * (away * away) < first) & (away < frames)

        return inside

    def _in_steps(self, squares: list[int], number: Number) -> Rule:
        """Radii that follow no formula, step by step. A table would cost a gather for every pair, for which CUDA kernels need
        more shared memory than an sm_89 has. Steps beyond any clip pad the list, so that windows share graphs."""
        first, *others = squares
        falls = [(away, square) for away, square in enumerate(others, 1) if square != squares[away - 1]]
        count = max(FEWEST_STEPS, 1 << (len(falls) - 1).bit_length())
        falls += [(MAX_CLIP_SIDE, 0)] * (count - len(falls))
        widest, steps = number(first), [(number(away), number(square)) for away, square in falls]

        def inside(query: Coordinates, key: Coordinates) -> Tensor:
            away = (query[0] - key[0]).abs()
            limit = widest
            for least, square in steps:
                limit = torch.where(away >= least, square, limit)
            return _square(query, key) < limit

        return inside

    def _square_at(self, layout: Layout, away: Tensor) -> Tensor:
        squares = torch.tensor(self.squares(layout.frames), dtype=torch.int32)
        return squares[away.clamp(max=layout.frames - 1).long()]

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        dt, dy, dx = (gap(of_query, of_key) for of_query, of_key in zip(query, key, strict=True))
        return dy * dy + dx * dx < self._square_at(layout, dt)

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        dt, dy, dx = (span(of_query, of_key) for of_query, of_key in zip(query, key, strict=True))
        return dy * dy + dx * dx < self._square_at(layout, dt)

    def image_pairs(self, layout: Layout) -> int:
        total = 0
        in_frame: dict[int, int] = {0: 0}
        for away, square in enumerate(self.squares(layout.frames)):
            if square not in in_frame:
                radius = math.isqrt(square - 1) + 1
                in_frame[square] = offset_pairs(layout, radius, functools.partial(_within, square))
            total += in_frame[square] * (layout.frames - away) * (2 if away else 1)
        return total


def _radius(square: int) -> str:
    """A label such as r16, or q300 for the square root of 300."""
    root = math.isqrt(square)
    return f"r{root}" if root**2 == square else f"q{square}"


def _within(square: int, dy: Tensor, dx: Tensor) -> Tensor:
    return dy * dy + dx * dx < square


def _square(query: Coordinates, key: Coordinates) -> Tensor:
    dy, dx = query[1] - key[1], query[2] - key[2]
    return dy * dy + dx * dx


def _check_radius(r: int) -> int:
    return check_int("window radius r", r, 1, 2 * MAX_SIDE, "in tokens")


def cylinder(r: int, frame_radius: int) -> Tube:
    """The disc of radius ``r`` in every frame up to ``frame_radius`` away: 2 * frame_radius + 1 frames.

    >>> cylinder(16, 1)
    Tube(squared_radii=(256, 256), repeat_last=False)

    Args:
        r: window radius in tokens, 1 or more.
        frame_radius: in latent frames (one of Wan's is four frames of video), 0 or more; 0: only the query's own frame.
    """
    check_int("frame_radius", frame_radius, 0, MAX_CLIP_SIDE - 1, "in frames of tokens")
    return Tube((_check_radius(r) ** 2,) * (frame_radius + 1))


def all_frames(r: int) -> Tube:
    """The disc of radius ``r`` in every frame."""
    return Tube((_check_radius(r) ** 2,), repeat_last=True)


def ball(r: int, frame_scale: int) -> Tube:
    """A ball in space and time: (frame_scale * dt)^2 + dy^2 + dx^2 < r^2.

    >>> ball(8, 4)
    Tube(squared_radii=(64, 48), repeat_last=False)

    Args:
        r: window radius in tokens, 1 or more.
        frame_scale: how many tokens one frame counts for, 1 or more.
    """
    check_int("frame_scale", frame_scale, 1, 2 * MAX_SIDE, "tokens to a frame")
    square = _check_radius(r) ** 2
    frames = range(min(-(-r // frame_scale), MAX_CLIP_SIDE))
    return Tube(tuple(square - (frame_scale * away) ** 2 for away in frames))


def radial(r: int) -> Tube:
    """A disc whose radius halves at 2, 4, 8 ... frames away, down to the same place, which is seen in all frames: the decay of
    Radial Attention (arXiv 2506.19852), with discs.

    >>> radial(4)
    Tube(squared_radii=(16, 16, 4, 4, 1), repeat_last=True)

    Args:
        r: window radius in tokens, 1 or more.
    """
    radii = [_check_radius(r), r]
    while radii[-1] > 1 and len(radii) < MAX_CLIP_SIDE:
        radii.append(max(r >> (len(radii).bit_length() - 1), 1))
    return Tube(tuple(radius**2 for radius in radii), repeat_last=True)
