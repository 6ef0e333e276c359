"""The number of video frames in which a radius applies (``frame_radius``), and checks that windows fit videos or images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from flexclear.masks import Disc, Window, all_frames, cylinder
from flexclear.masks.checks import check_int
from flexclear.masks.layout import MAX_CLIP_SIDE
from flexclear.runtime.family import Family
from flexclear.runtime.mechanism import WindowMechanism

ALL = "all"
"""The ``frame_radius`` of a window over every frame."""


class InFrames:
    """Makes windows from radii, and remembers whether it has made any.

    Attributes:
        frame_radius: as passed to ``transform``.
        video: whether the model is a video model.
        model: name of the model's class.
        asked: whether a window was made from a radius.
    """

    def __init__(self, frame_radius: int | str | None, video: bool, model: str) -> None:
        self.frame_radius, self.video, self.model, self.asked = frame_radius, video, model, False

    def __call__(self, radius: int) -> Window:
        """The window for a radius.

        Raises:
            TypeError, ValueError: the radius is invalid, or its frames are not known.
        """
        disc = Disc(radius)
        self.asked = True
        if not self.video:
            return disc
        if self.frame_radius is None:
            raise ValueError(
                f"r={radius} does not say which frames of a video are seen, and {self.model} is a video model. Pass "
                f"frame_radius=n for the query's own frame and n on either side, frame_radius={ALL!r} for all frames, or a "
                "window of flexclear.masks as r, such as radial(32)"
            )
        return all_frames(radius) if self.frame_radius == ALL else cylinder(radius, int(self.frame_radius))

    def check_used(self) -> None:
        """Raise if ``frame_radius`` was given but no radius.

        Raises:
            ValueError: it was.
        """
        if self.frame_radius is not None and not self.asked:
            raise ValueError(
                f"frame_radius={self.frame_radius!r} says in which frames a radius applies, but r holds no radius: windows of "
                "flexclear.masks define that themselves. Leave it out"
            )


def in_frames(frame_radius: Any, family: Family, model: nn.Module) -> InFrames:
    """The maker of windows for a model.

    Raises:
        TypeError, ValueError: ``frame_radius`` is invalid, or the model's images have no frames.
    """
    name = type(model).__name__
    if frame_radius is not None and not family.video:
        raise ValueError(
            f"frame_radius={frame_radius!r}: {name} makes images, which have no frames. Leave it out; r is the radius in tokens"
        )
    if frame_radius is not None and frame_radius != ALL:
        if isinstance(frame_radius, str):
            raise ValueError(f"frame_radius must be a number of frames or {ALL!r}, got {frame_radius!r}")
        check_int("frame_radius", frame_radius, 0, MAX_CLIP_SIDE - 1, "in frames of the latents")
    return InFrames(frame_radius, family.video, name)


def refuse_on_video(mechanism: WindowMechanism, family: Family, model: nn.Module) -> None:
    """Raise if ``mechanism``, a mask for images, would run on a video model.

    Raises:
        ValueError: it would.
    """
    if family.video:
        raise ValueError(
            f"attention={mechanism.kind!r} is defined for images, and {type(model).__name__} is a video model. Pass r and "
            "frame_radius, or a window of flexclear.masks as r"
        )


def refuse_image_windows(windows: Iterable[Window | None], family: Family, model: nn.Module) -> None:
    """Raise if a video model would get a window for images.

    Raises:
        ValueError: it would.
    """
    if not family.video:
        return
    for window in dict.fromkeys(windows):
        if window is not None and not window.knows_frames:
            raise ValueError(
                f"{window!r} is a window for images, and {type(model).__name__} is a video model: it does not say which frames "
                "are seen. cylinder, all_frames, ball, radial and Tube of flexclear.masks do, or r=radius with frame_radius"
            )
