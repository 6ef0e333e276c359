"""Images of the student during its training, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flexclear.compile.files import whole_file
from flexclear.distill.config import SheetConfig
from flexclear.distill.model_state import without_bars


@torch.no_grad()
def draw(pipe: Any, settings: SheetConfig) -> list[Any]:
    """One image for each prompt of the settings, each with a seed of its own."""
    size = {name: side for name in ("height", "width") if (side := getattr(settings, name)) is not None}
    with without_bars(pipe):
        return [
            pipe(
                prompt,
                num_inference_steps=settings.steps,
                generator=torch.Generator().manual_seed(settings.seed + number),
                **size,
            ).images[0]
            for number, prompt in enumerate(settings.prompts)
        ]


def write_sheet(pictures: list[Any], path: Path) -> None:
    """Write the images side by side to one PNG file."""
    from PIL import Image

    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    with whole_file(path) as beside:
        sheet.save(beside, format="PNG")
