"""Settings of the ControlNet's training, in a separate module so that the command line need not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from flexclear.embedded.train.schedule import Schedule


@dataclass(frozen=True)
class ControlRecipe:
    """Settings of the training.

    Attributes:
        steps: total steps.
        batch: images per step.
        pictures: number of different images, each with every condition.
        layers: double blocks. single_layers: single blocks.
        matrix_rate: learning rate of Muon, for matrices in blocks. other_rate: of AdamW, for the rest.
        noise_logit: median of the noise levels' logit; a condition matters most where noise hides the image.
        half_precision: bfloat16 autocast.
        compiled: compile the blocks of both models: a tenth faster on CPU, after a minute or two of compiling.
        save_every, sheet_every: steps between checkpoints, and between contact sheets.
        seed: seed of everything random.
    """

    steps: int = 600
    batch: int = 16
    pictures: int = 1536
    layers: int = 1
    single_layers: int = 2
    matrix_rate: float = 2e-3
    other_rate: float = 1e-3
    noise_logit: float = 0.8
    half_precision: bool = True
    compiled: bool = False
    save_every: int = 100
    sheet_every: int = 300
    seed: int = 11

    def schedule(self) -> Schedule:
        """Return the learning rate's schedule: a short warm-up, then a decay to zero."""
        return Schedule(min(20, self.steps // 4), self.steps // 4, self.steps)
