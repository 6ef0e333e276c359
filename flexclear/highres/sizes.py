"""Sizes of the stages: any aspect ratio, the same in all stages, each larger than the one before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Size: TypeAlias = int | tuple[int, int]
"""The longer side in pixels, or (height, width)."""


def stage_sizes(sizes: Sequence[Size], multiple: int, start: tuple[int, int] | None) -> list[tuple[int, int]]:
    """(height, width) of every stage.

    Args:
        sizes: the requested sizes. One number is the longer side; the other side follows from the aspect ratio of ``start``, or
            else of the first size that is a pair; otherwise the image is square.
        multiple: number of pixels that must divide every side.
        start: (height, width) of the image to start from, if there is one.

    Raises:
        TypeError: a size is neither a number nor a pair.
        ValueError: a side is not a multiple, or a stage is not larger than the one before or has another aspect ratio.
    """
    if isinstance(sizes, str | int) or not isinstance(sizes, Sequence) or not sizes:
        raise ValueError(f"sizes is a sequence of one or more sizes, such as [1024, 2048], got {sizes!r}")
    shape = start or next((size for size in sizes if not isinstance(size, int)), (1, 1))
    found: list[tuple[int, int]] = []
    for size in sizes:
        height, width = _pair(size, shape, multiple)
        if height % multiple or width % multiple or not height or not width:
            near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise ValueError(
                f"size {_named(size)}: sides must be multiples of {multiple} pixels; near it: {near[0]} x {near[1]}"
            )
        before = found[-1] if found else start
        if before is not None:
            _check_growth((height, width), before, multiple, first=not found)
        found.append((height, width))
    return found


def _pair(size: Size, shape: tuple[int, int], multiple: int) -> tuple[int, int]:
    if isinstance(size, bool):
        raise TypeError(f"a size is a number of pixels or (height, width), got {size!r}")
    if isinstance(size, int):
        shorter = max(multiple, round(size * min(shape) / max(shape) / multiple) * multiple)
        return (size, shorter) if shape[0] >= shape[1] else (shorter, size)
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise TypeError(f"a size is a number of pixels or (height, width), got {size!r}")
    return (size[0], size[1])


def _check_growth(size: tuple[int, int], before: tuple[int, int], multiple: int, first: bool) -> None:
    (height, width), (old_height, old_width) = size, before
    # Sides are rounded to tokens; the rounding of the size before grows with the enlargement.
    slack = multiple if first else multiple * max(1.0, max(size) / max(before))
    if abs(width - height * old_width / old_height) > slack and abs(height - width * old_height / old_width) > slack:
        raise ValueError(
            f"{height} x {width} has another aspect ratio than {old_height} x {old_width}, from which it is enlarged: the "
            "image would be distorted. Crop it first, or pass one number, the longer side"
        )
    larger = height * width > old_height * old_width or (first and max(size) >= max(before))
    if not larger:
        raise ValueError(
            f"every stage must be larger than what it is enlarged from, got {height} x {width} after {old_height} x "
            f"{old_width}"
        )


def _named(size: Size) -> str:
    return str(size) if isinstance(size, int) else f"{size[0]} x {size[1]}"
