"""Optimizers of section 5 of the method."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from flexclear.common.extras import require
from flexclear.distill.config import OptimizerConfig


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise if the optimizer's package is missing.

    Raises:
        ImportError: it is.
    """
    if config.name == "prodigy":
        require("prodigyopt", "optimizer.name: prodigy")


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names.

    Raises:
        ImportError: its package is missing.
    """
    shared: dict[str, Any] = {
        "lr": config.rate,
        "betas": (config.betas[0], config.betas[1]),
        "weight_decay": config.weight_decay,
        "eps": config.epsilon,
    }
    if config.name != "prodigy":
        return torch.optim.AdamW(parameters, **shared)
    check_optimizer(config)
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # It prints that its weight decay is decoupled.
        return Prodigy(
            parameters,
            **shared,
            use_bias_correction=config.use_bias_correction,
            safeguard_warmup=config.safeguard_warmup,
        )
