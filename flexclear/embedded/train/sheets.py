"""Contact sheets: many images in one PNG, to look at while training runs."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from flexclear.compile.files import whole_file


def save_sheet(pictures: torch.Tensor, columns: int, path: Path) -> None:
    """Save images as a grid.

    Args:
        pictures: shape (count, 3, height, width), values -1 to 1.
        columns: images per row.
        path: the PNG to write.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    values = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for index, picture in enumerate(values.permute(0, 2, 3, 1).cpu().numpy()):
        sheet.paste(Image.fromarray(picture), (index % columns * width, index // columns * height))
    with whole_file(path) as beside:
        sheet.save(beside, format="PNG")
