"""Random samples for distilling the tiny FLUX model."""

from __future__ import annotations

import torch

from flexclear.distill import MemorySamples, Sample


def random_samples(count=6, height=16, width=12, text_len=5, seed=0, channels=2, text_width=12, pooled_width=10):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    return MemorySamples(
        [
            Sample(
                noise(channels, height, width),
                noise(channels, height, width) - 4,
                noise(text_len, text_width),
                noise(pooled_width),
                str(number),
            )
            for number in range(count)
        ],
        scaling_factor=1.2,
        shift_factor=0.1,
    )
