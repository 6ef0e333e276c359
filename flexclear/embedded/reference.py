"""The sheet of clean emoji drawings that comes with the model, for recognizing what an image shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from flexclear.compile.files import whole_file
from flexclear.embedded.scenes import scale_bitmap
from flexclear.images.reading import read_image

FILE_NAME = "emoji.png"
CELL_PIXELS = 96
COLUMNS = 8


def write_reference_sheet(bitmaps: Sequence[Image.Image], folder: Path) -> None:
    """Write the bitmaps, each scaled into 96 x 96 pixels, eight to a row, as ``folder/emoji.png`` (RGBA)."""
    rows = -(-len(bitmaps) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL_PIXELS, rows * CELL_PIXELS), (0, 0, 0, 0))
    for index, bitmap in enumerate(bitmaps):
        sheet.paste(scale_bitmap(bitmap, CELL_PIXELS), _corner(index))
    with whole_file(folder / FILE_NAME) as beside:
        sheet.save(beside, format="PNG", optimize=True)


def read_reference_sheet(folder: Path, count: int) -> list[Image.Image]:
    """Return the first ``count`` drawings of ``folder/emoji.png``, each RGBA of 96 x 96 pixels.

    Raises:
        FileNotFoundError: the folder holds no such sheet.
        ValueError: the sheet holds fewer drawings.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so the embedded model is not completely installed")
    sheet = read_image(path).convert("RGBA")
    room = (sheet.width // CELL_PIXELS) * (sheet.height // CELL_PIXELS)
    if count > room:
        raise ValueError(f"{path} holds at most {room} drawings; {count} were requested")
    corners = [_corner(index) for index in range(count)]
    return [sheet.crop((x, y, x + CELL_PIXELS, y + CELL_PIXELS)) for x, y in corners]


def _corner(index: int) -> tuple[int, int]:
    return index % COLUMNS * CELL_PIXELS, index // COLUMNS * CELL_PIXELS
