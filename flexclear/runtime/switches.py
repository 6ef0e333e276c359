"""Settings that may change between calls: options of ``transform`` that ``override`` changes inside a ``with`` block."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexclear.masks.defaults import independent

TRAINING_TOKENS = 4096 + 512
"""n0 of proportional attention: tokens of FLUX.1 at 1024 x 1024 px, text included (method, section 7)."""

DENSE_STEPS_NEED = (
    "dense_steps counts denoising steps, so transform needs the pipeline, whose scheduler counts them: "
    "flexclear.transform(pipe, ...)"
)


@dataclass(frozen=True)
class Switches:
    """Per-call settings.

    Attributes:
        ntk_factor: factor on the base of the rotary frequencies; 1 leaves them unchanged.
        proportional_attention: whether the attention scale is sqrt(log_n0(n) / d) instead of sqrt(1 / d).
        dense_steps: how many first and last denoising steps run dense attention.
        ntk_floor: smallest share of the model's own rotary frequencies that ``ntk_factor`` may leave; 0: no limit.
        training_tokens: n0 of proportional attention.
    """

    ntk_factor: float = 1.0
    proportional_attention: bool = False
    dense_steps: tuple[int, int] = (0, 0)
    ntk_floor: float = 0.0
    training_tokens: int = TRAINING_TOKENS

    def __post_init__(self) -> None:
        factor = self.ntk_factor
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise TypeError(f"ntk_factor must be a number, got {factor!r}")
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"ntk_factor must be positive and finite, got {factor!r}")
        if not isinstance(self.proportional_attention, bool):
            raise TypeError(f"proportional_attention must be True or False, got {self.proportional_attention!r}")
        steps = self.dense_steps
        if (
            not isinstance(steps, tuple)
            or len(steps) != 2
            or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in steps)
        ):
            raise ValueError(f"dense_steps must be (first, last), two step counts >= 0, got {steps!r}")
        floor, tokens = self.ntk_floor, self.training_tokens
        if isinstance(floor, bool) or not isinstance(floor, int | float):
            raise TypeError(f"ntk_floor must be a number, got {floor!r}")
        if not 0 <= floor <= 1:
            raise ValueError(f"ntk_floor is a share of each frequency, 0 to 1, got {floor!r}")
        if isinstance(tokens, bool) or not isinstance(tokens, int):
            raise TypeError(f"training_tokens must be a whole number, got {tokens!r}")
        if tokens < 2:
            raise ValueError(f"training_tokens must be 2 or more, got {tokens!r}")


class _Block:
    """An ``override`` that has begun.

    Attributes:
        given: its settings.
        ended: whether it has ended outside of the context in which it began.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.ended = False


_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("flexclear_overrides", default=())


@contextlib.contextmanager
def override(
    *,
    ntk_factor: float | None = None,
    proportional_attention: bool | None = None,
    dense_steps: tuple[int, int] | None = None,
    ntk_floor: float | None = None,
    training_tokens: int | None = None,
) -> Iterator[None]:
    """Change per-call settings of every transformed model for the calls inside a ``with`` block of this thread.

    >>> with flexclear.override(ntk_factor=10.0, proportional_attention=True):      # doctest: +SKIP
    ...     pipe(prompt, height=4096, width=4096)

    Args:
        ntk_factor: factor on the base of the rotary frequencies, 10 in the released high-resolution settings; 1 changes nothing.
        proportional_attention: scale the scores by sqrt(log_n0(n) / d) instead of sqrt(1 / d), where n0 = 4608 and n is the
            number of keys (10 n with down-sampled keys).
        dense_steps: (first, last): how many denoising steps at either end run dense attention.
        ntk_floor: smallest share of each rotary frequency that ``ntk_factor`` may leave, 0 to 1. The side of the training
            images divided by that of the image being drawn limits NTK to linear interpolation (I-Max, arXiv 2410.07536).
            FLUX.1 only.
        training_tokens: n0 for a model that was trained with a different number of tokens (text included) than FLUX.1.

    Blocks nest: settings that an inner block leaves out keep the outer block's values. Blocks may end in any order, as when
    two generators take turns; each block's settings end with it.

    Raises:
        TypeError, ValueError: a setting is invalid.
    """
    asked = {
        "ntk_factor": ntk_factor,
        "proportional_attention": proportional_attention,
        "dense_steps": dense_steps,
        "ntk_floor": ntk_floor,
        "training_tokens": training_tokens,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    Switches(**given)  # type: ignore[arg-type]
    block = _Block(given)
    _blocks.set((*_begun(), block))
    try:
        yield
    finally:
        # Not with the token of ``set``, which would restore whatever was in force when the block began.
        begun = _begun()
        block.ended = block not in begun
        _blocks.set(tuple(other for other in begun if other is not block))


def _begun() -> tuple[_Block, ...]:
    return tuple(block for block in _blocks.get() if not block.ended)


def in_force(own: Switches) -> Switches:
    """A model's own switches with this thread's overrides applied."""
    for block in _begun():
        own = replace(own, **block.given)
    return own


def proportional_gain(keys: int, pooled: bool, device: torch.device, training_tokens: int = TRAINING_TOKENS) -> Tensor:
    """Factor on the queries that turns sqrt(1 / d) into sqrt(log_n0(n) / d): 0-d float32 on ``device``.

    Args:
        keys: number of keys n, including text but not pooled keys. If there are pooled keys, log_n0(10 n) is used, as in the
            released code (method, section 7).
        pooled: whether there are pooled keys.
        device: device of the result.
        training_tokens: n0.
    """
    return _gain(math.sqrt(math.log(10 * keys if pooled else keys, training_tokens)), device)


@functools.lru_cache(maxsize=64)
@independent
def _gain(value: float, device: torch.device) -> Tensor:
    # A tensor, not a number: otherwise blocks would be compiled again for every size.
    return torch.tensor(value, dtype=torch.float32, device=device)
