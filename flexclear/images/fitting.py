"""Prepares images for a model: put on white, scaled and cropped to a size."""

from __future__ import annotations

from PIL import Image

LARGEST_SCALED = 1 << 26
"""Maximum pixels before cropping, unless the crop is as large, since a narrow image could grow without bounds."""


def on_white(picture: Image.Image) -> Image.Image:
    """The image in RGB, with transparent parts on white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def fitted(picture: Image.Image, size: tuple[int, int] | None, multiple: int) -> Image.Image:
    """Scale to cover ``size`` and center-crop; None: crop to multiples of ``multiple``.

    Raises:
        ValueError: the image is smaller than ``multiple``, or so narrow that it would be huge when scaled.
    """
    if size is None:
        height, width = (side // multiple * multiple for side in (picture.height, picture.width))
        if not height or not width:
            raise ValueError(f"{picture.height} x {picture.width} pixels are fewer than the VAE takes ({multiple})")
    else:
        height, width = size
        scale = max(height / picture.height, width / picture.width)
        if scale != 1:
            new = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
            if new[0] * new[1] > max(LARGEST_SCALED, 4 * height * width):
                raise ValueError(
                    f"{picture.height} x {picture.width} pixels scaled to cover {height} x {width} are {new[1]} x {new[0]}"
                )
            picture = picture.resize(new, Image.Resampling.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
