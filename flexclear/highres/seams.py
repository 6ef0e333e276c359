"""How visible the borders of tiles are in an image."""

from __future__ import annotations

from torch import Tensor


def seam_ratio(picture: Tensor, period: int) -> float:
    """Mean absolute step across borders at multiples of ``period``, divided by that between all other neighbors.

    1 means no seam: pixels on both sides of a border differ as much as any neighbors do. Rows and columns count equally.

    Args:
        picture: ``[channels, height, width]``, any scale.
        period: distance between borders in pixels, 2 or more, and smaller than a side.

    Raises:
        ValueError: the image has no border, or does not have the shape of an image.
    """
    if picture.ndim != 3 or period < 2 or period >= min(picture.shape[1:]):
        raise ValueError(
            f"an image [channels, height, width] whose sides are longer than a period of 2 or more is needed, got shape "
            f"{tuple(picture.shape)} and period {period}"
        )
    across, elsewhere, borders, others = 0.0, 0.0, 0, 0
    for dim in (1, 2):
        steps = picture.float().diff(dim=dim).abs().mean(dim=(0, 3 - dim))
        at = steps[period - 1 :: period]
        across, borders = across + at.sum().item(), borders + len(at)
        elsewhere, others = elsewhere + (steps.sum() - at.sum()).item(), others + len(steps) - len(at)
    least = 1e-6  # a flat image has no seams
    return (across / borders + least) / (elsewhere / others + least)
