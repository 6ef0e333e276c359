"""Optimizers of the method's section 5."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from flexclear.distill.config import OptimizerConfig


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise if the optimizer's package is missing.

    Raises:
        ImportError: it is.
    """
    if config.name == "prodigy":
        try:
            import prodigyopt  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "optimizer.name: prodigy needs the package prodigyopt (pip install prodigyopt); adamw needs none"
            ) from error


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names.

    Raises:
        ImportError: its package is missing.
    """
    betas = (config.betas[0], config.betas[1])
    if config.name == "prodigy":
        check_optimizer(config)
        from prodigyopt import Prodigy

        return Prodigy(parameters, lr=config.rate, betas=betas, weight_decay=config.weight_decay, eps=config.epsilon)
    return torch.optim.AdamW(
        parameters, lr=config.rate, betas=betas, weight_decay=config.weight_decay, eps=config.epsilon
    )
