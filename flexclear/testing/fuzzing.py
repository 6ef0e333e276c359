"""Fuzzing as a product: keep trying masks, shrink a failure, print it as Python that reproduces it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from flexclear.masks import Layout, MaskMod, Window, block_mask
from flexclear.testing.checks import Builder, assert_matches_dense
from flexclear.testing.strategies import KINDS, block_sizes, dtypes, layouts, windows

EXAMPLES_PER_ROUND = 200
ATTENTION_BLOCKS = ((128, 64), (64, 64))
"""Block sizes under which attention runs too. Each is a compile of its own; the mask alone is checked under all."""


@dataclass(frozen=True)
class Own:
    """A ``mask_mod`` factory of somebody's own in the place of a window: ``layout -> mask_mod``."""

    factory: Callable[[Layout], MaskMod]


@dataclass(frozen=True)
class Case:
    """One try: the arguments of ``assert_matches_dense``."""

    layout: Layout
    window: Window | Own
    block_size: int | tuple[int, int]
    dtype: torch.dtype
    attention: bool

    def as_python(self, device: str) -> str:
        """A program that repeats this case."""
        own = self.window if isinstance(self.window, Own) else None
        return (
            "import torch\n"
            "from flexclear.masks import *\n"
            "from flexclear.testing import assert_matches_dense\n"
            + (f"from {own.factory.__module__} import {own.factory.__name__}\n" if own else "")
            + f"\nlayout = {self.layout!r}\n"
            f"window = {f'{own.factory.__name__}(layout)' if own else repr(self.window)}\n"
            f"assert_matches_dense(layout, window, block_size={self.block_size!r}, dtype={self.dtype!r}, "
            f"device={device!r}, attention={self.attention!r})\n"
        )


@dataclass(frozen=True)
class Report:
    """What a run found.

    Attributes:
        examples: cases tried, those of shrinking included.
        seconds: how long it took.
        failure: the smallest failing case, or None.
        error: what it raises, or None.
    """

    examples: int
    seconds: float
    failure: Case | None = None
    error: Exception | None = None


@st.composite
def cases(draw: st.DrawFn, kinds: Sequence[str] = KINDS, attention: bool = True, own: Own | None = None) -> Case:
    """Cases of the given kinds of windows, see ``KINDS``, or of one's own factory."""
    layout = draw(layouts())
    block_size = draw(block_sizes)
    return Case(
        layout=layout,
        window=own or draw(windows(layout, kinds)),
        block_size=block_size,
        dtype=draw(dtypes),
        attention=attention and block_size in ATTENTION_BLOCKS,
    )


def fuzz(
    seconds: float,
    *,
    kinds: Sequence[str] = KINDS,
    device: str = "cpu",
    attention: bool = True,
    build: Builder = block_mask,
    own: Callable[[Layout], MaskMod] | None = None,
    seed: int | None = None,
    on_example: Callable[[int], None] = lambda count: None,
) -> Report:
    """Try cases for ``seconds``; a failure ends the run and is shrunk to the smallest case that still fails.

    Args:
        seconds: how long to try; shrinking and a compile under way may take longer.
        kinds: kinds of windows.
        device: ``"cpu"`` (mask and output) or ``"cuda"`` (log-sum-exp and gradients too).
        attention: False checks the masks alone, a hundred times as many.
        build: what makes the block masks.
        own: a ``mask_mod`` factory to try in place of windows: ``layout -> mask_mod`` over the layout's sequence
            positions, its tensors on ``device``. Then its classification and the attention under it are checked.
        seed: of the random choices; None takes another one each time.
        on_example: called with the number of cases so far.

    Raises:
        ValueError: ``seconds`` is not positive or a kind is unknown.
    """
    if seconds <= 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    windows(Layout(1, 1), kinds)
    start, count = time.monotonic(), 0
    errors: dict[Case, Exception] = {}
    chooser = random.Random(seed)

    def fails(case: Case) -> bool:
        nonlocal count
        if not errors and time.monotonic() - start > seconds:
            return False
        count += 1
        on_example(count)
        try:
            assert_matches_dense(
                case.layout,
                case.window.factory(case.layout) if isinstance(case.window, Own) else case.window,
                block_size=case.block_size,
                dtype=case.dtype,
                device=device,
                attention=case.attention,
                build=build,
            )
        except Exception as error:  # whatever a case raises is a finding
            errors[case] = error
            return True
        return False

    rules = settings(
        max_examples=EXAMPLES_PER_ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    while time.monotonic() - start <= seconds:
        try:
            strategy = cases(kinds, attention, Own(own) if own else None)
            found = find(strategy, fails, settings=rules, random=random.Random(chooser.getrandbits(64)))
        except NoSuchExample:
            continue
        return Report(count, time.monotonic() - start, found, errors[found])
    return Report(count, time.monotonic() - start)
