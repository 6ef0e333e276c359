"""Training a model's attention to match its dense self under a window (method, section 5).

>>> from flexclear.distill import DistillConfig, distill
>>> distill(pipe, DistillConfig(output=Path("runs/r16"), data=Path("cache"), r=16))     # doctest: +SKIP
"""

from __future__ import annotations

from flexclear.distill.config import DistillConfig, LossConfig, OptimizerConfig, read_config
from flexclear.distill.samples import CachedSamples, MemorySamples, Sample
from flexclear.distill.trainer import Distilled, distill

__all__ = [
    "CachedSamples",
    "DistillConfig",
    "Distilled",
    "LossConfig",
    "MemorySamples",
    "OptimizerConfig",
    "Sample",
    "distill",
    "read_config",
]
