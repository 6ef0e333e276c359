"""Images to score."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(seed, height=48, width=40):
    """Smooth noise, so that neighbouring pixels are similar."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def disturbed(image, seed, amount=25):
    noise = np.random.default_rng(seed).normal(0, amount, np.asarray(image).shape)
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
