"""Arguments of ``flexclear generate`` that its tests share."""

from __future__ import annotations

from PIL import Image

APPLE = "a red apple on a blue background"
FLOWER = "a sunflower on a white background"
ON_CPU = ("--device", "cpu", "--backend", "sdpa")
FAST = ("--steps", 2, "--text-len", 32, "--size", "64x96", *ON_CPU)


def pixels(line_or_path):
    path = line_or_path["path"] if isinstance(line_or_path, dict) else line_or_path
    with Image.open(path) as picture:
        return picture.size, picture.convert("RGB").tobytes()
