"""Labeled images: contact sheets with one row per prompt and one column per variant, and panels side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN = 12
LABEL_WIDTH = 180
HEADER_HEIGHT = 46


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    cell: int = 176,
) -> Image.Image:
    """Put images into a labeled grid on white, each scaled into ``cell`` x ``cell`` pixels, keeping its aspect ratio.

    Args:
        rows: images by row and column.
        row_labels: one per row, wrapped to the width of the label column on the left.
        column_labels: one per column, with line breaks as given.
        cell: side of a cell in pixels.

    Raises:
        ValueError: the labels do not match the grid.
    """
    columns = len(column_labels)
    if len(rows) != len(row_labels) or any(len(row) != columns for row in rows):
        raise ValueError(
            f"need one label per row and column, got {len(row_labels)} row labels for {len(rows)} rows and {columns} "
            f"column labels for rows of {sorted({len(row) for row in rows})} images"
        )
    font = ImageFont.load_default(size=14)
    width = LABEL_WIDTH + columns * (cell + MARGIN) + MARGIN
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [measure.multiline_textbbox((0, 0), label, font) for label in column_labels]
    header = max([HEADER_HEIGHT, *(math.ceil(bottom - top) + MARGIN for _, top, _, bottom in boxes)])
    sheet = Image.new("RGB", (width, header + len(rows) * (cell + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        left = LABEL_WIDTH + column * (cell + MARGIN)
        draw.multiline_text((left + cell / 2, header / 2), label, "black", font, anchor="mm", align="center")
    for index, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        top = header + index * (cell + MARGIN)
        draw.multiline_text((MARGIN, top + cell / 2), textwrap.fill(label, 20), "black", font, anchor="lm")
        for column, picture in enumerate(row):
            scale = cell / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            fitted = picture.convert("RGB").resize(
                size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
            )
            left = LABEL_WIDTH + column * (cell + MARGIN) + (cell - size[0]) // 2
            sheet.paste(fitted, (left, top + (cell - size[1]) // 2))
    return sheet


def side_by_side(
    pictures: Sequence[Tensor], titles: Sequence[str], least_side: int = 448, columns: int | None = None
) -> Image.Image:
    """Show small uint8 ``[height, width, 3]`` tensors as titled panels, enlarged by integer factors so that pixels stay square.

    Args:
        pictures: the panels.
        titles: one per panel, wrapped above it.
        least_side: approximate length of a panel's longer side, in pixels.
        columns: panels per row; all in one row by default.
    """
    font = ImageFont.load_default(size=13)
    columns = columns or len(pictures)
    panels = []
    for picture in pictures:
        factor = max(1, round(least_side / max(picture.shape[:2])))
        panels.append(
            Image.fromarray(picture.numpy()).resize((picture.shape[1] * factor, picture.shape[0] * factor), 0)
        )
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    width = max(sum(panel.width + MARGIN for panel in row) for row in rows) + MARGIN
    height = sum(max(panel.height for panel in row) + HEADER_HEIGHT for row in rows) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw, top, names = ImageDraw.Draw(sheet), 0, iter(titles)
    for row in rows:
        left = MARGIN
        for panel in row:
            wrapped = textwrap.fill(next(names), max(10, panel.width // 8))
            draw.multiline_text((left, top + HEADER_HEIGHT / 2), wrapped, "black", font, anchor="lm")
            sheet.paste(panel, (left, top + HEADER_HEIGHT))
            left += panel.width + MARGIN
        top += max(panel.height for panel in row) + HEADER_HEIGHT
    return sheet
