"""Read the color bitmaps of emoji from the Noto Color Emoji font."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from flexclear.common.extras import require

DEFAULT_FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


class EmojiFontError(RuntimeError):
    """The emoji font is missing, or holds no colour bitmap for a wanted code point."""


def extract_bitmaps(code_points: Sequence[int], font_path: Path | None = None) -> list[Image.Image]:
    """Return one RGBA image per code point, each 136 x 128 pixels.

    Args:
        code_points: Unicode code points, such as ``0x1F34E`` (red apple).
        font_path: a font with CBDT colour bitmaps; by default, Debian's Noto Color Emoji.

    Raises:
        EmojiFontError: the font file or the fontTools library is missing, the font has no colour bitmaps,
            or it has none for one of the code points.
    """
    path = DEFAULT_FONT_PATH if font_path is None else Path(font_path)
    if not path.is_file():
        raise EmojiFontError(
            f"no emoji font at {path}: install the Debian or Ubuntu package fonts-noto-color-emoji "
            "(apt-get install fonts-noto-color-emoji), or pass the path of a NotoColorEmoji.ttf with bitmaps"
        )
    try:
        require("fontTools", "reading the emoji font")
    except ImportError as error:
        raise EmojiFontError(str(error)) from error
    from fontTools.ttLib import TTFont

    with TTFont(path) as font:
        if "CBDT" not in font:
            raise EmojiFontError(f"{path} has no CBDT table, so it holds no colour bitmaps")
        glyph_names = font.getBestCmap()
        strike = font["CBDT"].strikeData[0]
        bitmaps = []
        for code_point in code_points:
            glyph_name = glyph_names.get(code_point)
            if glyph_name is None or glyph_name not in strike:
                raise EmojiFontError(f"{path} has no colour bitmap for U+{code_point:04X}")
            bitmaps.append(Image.open(io.BytesIO(strike[glyph_name].imageData)).convert("RGBA"))
    return bitmaps
