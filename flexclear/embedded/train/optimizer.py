"""Two optimizers in one: Muon for the matrices of transformer blocks, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class SplitOptimizer:
    """Muon on block matrices and AdamW on the other parameters, with one learning-rate factor."""

    def __init__(
        self, transformer: nn.Module, others: Iterable[nn.Module], matrix_rate: float, other_rate: float
    ) -> None:
        matrices = [p for name, p in transformer.named_parameters() if _is_block_matrix(name, p)]
        chosen = {id(parameter) for parameter in matrices}
        rest = [p for p in transformer.parameters() if id(p) not in chosen]
        rest += [p for module in others for p in module.parameters()]
        self.parameters = matrices + rest
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=other_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._rates = (matrix_rate, other_rate)

    def step(self, factor: float) -> None:
        """Clip the gradients to norm 1, step both optimizers at ``factor`` of their rates, clear them."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, rate in zip(self._parts, self._rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return both optimizers' states."""
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, states: list[dict[str, Any] | None]) -> None:
        """Restore what :meth:`state_dict` returned; an optimizer whose state is None starts afresh."""
        for part, state in zip(self._parts, states, strict=True):
            if state is not None:
                part.load_state_dict(state)


def _is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    in_block = name.startswith(("transformer_blocks.", "single_transformer_blocks."))
    is_modulation = "norm" in name
    return in_block and not is_modulation and parameter.ndim == 2
