"""A fuzzer for users: it keeps trying masks, shrinks a failure, and prints it as Python that reproduces it.

Layouts are small, with reference grids, long, or large; see ``ROUNDS``. Correct results come from ``oracle.py``, never from the
code under test.
"""

from __future__ import annotations

import dataclasses
import itertools
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
from flexclear.testing.strategies import (
    KINDS,
    OF_IMAGES,
    ON_ONE_GRID,
    block_sizes,
    clips,
    dtypes,
    large_layouts,
    layouts,
    long_layouts,
    narrow,
    sides,
    windows,
)

ATTENTION_BLOCKS = ((128, 64), (64, 64))
"""Block sizes for which attention also runs. Each needs a separate compilation; masks alone are checked for all sizes."""

SHRINKING = 20
"""Maximum seconds for shrinking a failure."""


@dataclass(frozen=True)
class Round:
    """Some tries with one kind of layout. Kinds take turns, so that a short run covers all of them.

    Attributes:
        layouts: strategy that draws the layouts.
        block_sizes: block sizes to use.
        examples: number of tries.
        attention: whether compiled attention may run.
        around: whether to check what is derived besides the mask, which takes ten times as long.
    """

    layouts: st.SearchStrategy[Layout]
    block_sizes: st.SearchStrategy[int | tuple[int, int]] = block_sizes
    examples: int = 30
    attention: bool = False
    around: bool = True


ROUNDS = {
    "masks": Round(layouts(narrow | sides), examples=200, attention=True, around=False),
    "small": Round(layouts()),
    "references": Round(layouts(st.integers(1, 24), most_references=2)),
    "long": Round(long_layouts(most_references=1)),
    "clips": Round(clips()),
    # More than 2^20 pairs of blocks of 16, which are searched in groups.
    "grouped": Round(large_layouts(16_500), st.just(16), examples=6),
    # More tokens than 16 bits can count: FLUX at 4096 px.
    "large": Round(large_layouts(66_000), st.sampled_from([(128, 64), 64, 128]), examples=3),
}


@dataclass(frozen=True)
class Own:
    """A user's ``mask_mod`` factory instead of a window: ``layout -> mask_mod``."""

    factory: Callable[[Layout], MaskMod]


@dataclass(frozen=True)
class Case:
    """One try: the arguments of ``assert_matches_dense``."""

    layout: Layout
    window: Window | Own
    block_size: int | tuple[int, int]
    dtype: torch.dtype
    attention: bool
    around: bool = True

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
            f"device={device!r}, attention={self.attention!r}, around={self.around!r})\n"
        )


@dataclass(frozen=True)
class Report:
    """What a run found.

    Attributes:
        examples: number of cases tried, including those of shrinking.
        seconds: how long it took.
        failure: the smallest failing case, or None.
        error: the error that it raises, or None.
    """

    examples: int
    seconds: float
    failure: Case | None = None
    error: Exception | None = None


@st.composite
def cases(
    draw: st.DrawFn,
    kinds: Sequence[str] = KINDS,
    attention: bool = True,
    own: Own | None = None,
    turn: Round = ROUNDS["masks"],
) -> Case:
    """Cases of the given kinds of windows, see ``KINDS``, or of a user's factory."""
    layout = draw(turn.layouts)
    if set(kinds) <= set(ON_ONE_GRID):
        layout = dataclasses.replace(layout, references=())
    if set(kinds) <= set(OF_IMAGES) and layout.frames > 1:
        layout = dataclasses.replace(layout, frames=1, order="tiled")
    block_size = draw(turn.block_sizes)
    return Case(
        layout=layout,
        window=own or draw(windows(layout, kinds)),
        block_size=block_size,
        dtype=draw(dtypes),
        attention=attention and turn.attention and block_size in ATTENTION_BLOCKS,
        around=turn.around,
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
    """Try cases for ``seconds``. A failure ends the run and is shrunk, for up to 20 seconds, to a small case that still fails.

    Args:
        seconds: how long to try, not counting shrinking and a compile in progress. At least one case is tried.
        kinds: kinds of windows.
        device: ``"cpu"`` (mask and output) or ``"cuda"`` (also log-sum-exp and gradients).
        attention: whether compiled attention also runs, after a third of the time; False checks only the masks.
        build: function that makes the block masks.
        own: a ``mask_mod`` factory to try instead of windows: ``layout -> mask_mod`` over the layout's sequence positions, with
            its tensors on ``device``. Then its classification and the attention under it are checked.
        seed: seed of the random choices; None uses a different one each time.
        on_example: called with the number of cases so far.

    Raises:
        ValueError: ``seconds`` is not positive or a kind is unknown.
    """
    if seconds <= 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    windows(Layout(1, 1), kinds)
    start, count = time.monotonic(), 0
    found_at = float("inf")
    errors: dict[Case, Exception] = {}
    chooser = random.Random(seed)

    def fails(case: Case) -> bool:
        nonlocal count, found_at
        if case in errors:
            return True
        now = time.monotonic()
        if (count and not errors and now - start > seconds) or now - found_at > SHRINKING:
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
                around=case.around,
                build=build,
            )
        except Exception as error:  # anything that a case raises is a finding
            errors[case] = error
            found_at = min(found_at, time.monotonic())
            return True
        return False

    # A user's factory may not support reference grids, and its reference evaluates every pair.
    turns = itertools.cycle([ROUNDS["masks"]] if own else ROUNDS.values())
    while not count or time.monotonic() - start <= seconds:
        turn = next(turns)
        rules = settings(
            max_examples=turn.examples,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        # One compilation takes as long as hundreds of masks, so the masks come first.
        compiled = attention and time.monotonic() - start > seconds / 3
        strategy = cases(kinds, compiled, Own(own) if own else None, turn)
        try:
            found = find(strategy, fails, settings=rules, random=random.Random(chooser.getrandbits(64)))
        except NoSuchExample:
            continue
        return Report(count, time.monotonic() - start, found, errors[found])
    return Report(count, time.monotonic() - start)
