"""Names and limits of options, without torch, so that a mistyped option is refused before torch is imported."""

from __future__ import annotations

import math
import re

EMBEDDED = "embedded"
"""Name of the model inside the package, accepted in place of any folder or hub id."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

BACKENDS = ("auto", "flex", "sdpa")
"""``"flex"``: compiled FlexAttention over a BlockMask. ``"sdpa"``: masked SDPA over a dense boolean mask. ``"auto"``:
flex if it can run, otherwise sdpa."""

DTYPES = ("float32", "bfloat16", "float16")
"""Data types of weights, as torch names them."""

RECIPES = ("rowwise", "tensorwise", "weight_only", "int8")
"""Keys of ``flexclear.compile.RECIPES``."""

METHODS = ("sdedit", "imax")
"""Methods of ``flexclear.highres``."""

TEXTS = ("exact", "average")
"""How ``flexclear.parallel`` computes text queries."""

EXCHANGES = ("sync", "stale")
"""Which borders ``flexclear.parallel`` exchanges."""

OFFLOADS = ("model", "sequential", "group")
"""What stays in main memory while the rest of a pipeline is on the accelerator: all models but one, all layers but one, or all
blocks of a transformer but one."""

VIDEO_FORMATS = ("gif", "mp4", "png")
"""Formats for videos: an animated GIF, an MP4 file (extra ``video``), or a folder of PNG frames."""

ALL_FRAMES = "all"
"""The frame radius of a window over every frame."""

LARGEST_SEED = 2**64 - 1
"""The limit of ``torch.Generator``, which keeps 64 bits."""


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{option} must be one of {list(choices)}, got {value!r}")


def check_finite(option: str, value: float | None) -> None:
    """Raise unless ``value`` is a finite number or None.

    Raises:
        ValueError: it is NaN or infinite.
    """
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{option} must be a finite number, got {value}")


def check_seeds(option: str, first: int, count: int = 1) -> None:
    """Raise unless ``first`` and the ``count - 1`` numbers after it are valid seeds.

    Raises:
        ValueError: one is negative or has more than 64 bits.
    """
    if not 0 <= first <= LARGEST_SEED - (count - 1):
        further = f" for {count} images with a seed each" if count > 1 else ""
        raise ValueError(f"{option} must be from 0 to {LARGEST_SEED - (count - 1)}{further}, got {first}")


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of ``"HxW"``.

    Raises:
        ValueError: it is not a size.
    """
    match = re.fullmatch(r"(\d{1,9})\s*[xX×]\s*(\d{1,9})", text.strip())  # noqa: RUF001
    if match is None or 0 in (size := (int(match[1]), int(match[2]))):
        raise ValueError(f"a size is HEIGHTxWIDTH in pixels, such as 1024x768; got {text!r}")
    return size


def parse_sizes(text: str) -> tuple[int | tuple[int, int], ...]:
    """Sizes of ``"1024,2048"`` or ``"1024x768,2048x1536"`` (HEIGHTxWIDTH).

    Raises:
        ValueError: it is neither.
    """
    sizes: list[int | tuple[int, int]] = []
    for part in text.split(","):
        try:
            sizes.append(int(part) if part.strip().isdecimal() else parse_size(part))
        except ValueError as error:
            raise ValueError(
                f"sizes are written 1024,2048,4096 (the longer side) or 1024x768,2048x1536 (HEIGHTxWIDTH), got {text!r}"
            ) from error
    return tuple(sizes)


def parse_frame_radius(text: str) -> int | str:
    """The number of frames, or ``"all"``.

    Raises:
        ValueError: it is neither.
    """
    if text == ALL_FRAMES:
        return text
    if re.fullmatch(r"\d{1,9}", text.strip()) is None:
        raise ValueError(
            f"--frame-radius is a number of latent frames on either side, 0 or more, or {ALL_FRAMES!r}; got {text!r}"
        )
    return int(text)
