"""Tiny FLUX models and random samples that fit them."""

from __future__ import annotations

import pytest

from flexclear.distill import DistillConfig, OptimizerConfig
from flexclear.distill.config import CheckpointConfig, HeldOutConfig

from helpers.distill_samples import random_samples
from helpers.models import tiny_flux


@pytest.fixture
def samples():
    return random_samples()


@pytest.fixture
def model():
    return tiny_flux(num_single_layers=5)


@pytest.fixture
def fresh():
    """Makes the same tiny model again and again."""
    return lambda: tiny_flux(num_single_layers=5)


@pytest.fixture
def settings(tmp_path):
    """Settings of a run of a few steps; keyword arguments replace them."""

    def make(output="run", **changed):
        return DistillConfig(
            **{
                "output": tmp_path / output,
                "r": 2,
                "backend": "sdpa",
                "steps": 6,
                "batch_size": 2,
                "gradient_accumulation": 1,
                "device": "cpu",
                "checkpoints": CheckpointConfig(every=3),
                "held_out": HeldOutConfig(count=2),
                "optimizer": OptimizerConfig("adamw"),
                **changed,
            }
        )

    return make


@pytest.fixture
def any_precision():
    """accelerate keeps the precision of a process's first run; this forgets it before and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
