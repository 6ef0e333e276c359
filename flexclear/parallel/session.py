"""One model's runs over several ranks: when they begin and end, and what is checked before a call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.compile.kernels import Kernel
from flexclear.masks import Layout, Window
from flexclear.parallel.band import BandCall
from flexclear.parallel.compiled import ticket_of
from flexclear.parallel.ends import watch_loop
from flexclear.parallel.errors import AgreedError
from flexclear.parallel.facts import differences, facts_of_call, facts_of_model
from flexclear.parallel.links import Links
from flexclear.parallel.masks import BandPlan, get_band_plan
from flexclear.parallel.planning import Bands, cut
from flexclear.parallel.transfers import Pending
from flexclear.runtime.facts import Call, Settings, Slot
from flexclear.runtime.family import Family
from flexclear.runtime.steps import StepCounter


@dataclass(frozen=True)
class Options:
    """How a model runs over its ranks; see ``flexclear.parallel.enable``."""

    text: str = "exact"
    exchange: str = "sync"
    warmup_steps: int = 4
    shares: tuple[float, ...] | None = None
    too_small: str = "raise"
    timeout: float = 300.0


@dataclass
class _Borders:
    """The transfer of one layer's borders, and the step in which it began."""

    step: int
    pending: Pending


class Session:
    """State that a run over several ranks keeps between calls, a ``Partition``; one call at a time.

    Args:
        links: the connections between the ranks.
        options: see ``Options``.
        steps: knows the denoising step of a pipeline's call.
    """

    def __init__(self, links: Links, options: Options, steps: StepCounter) -> None:
        self.links = links
        self.options = options
        self.steps = steps
        self.current: BandCall | None = None
        self.ticket = ticket_of(self)
        self._calls = 0
        self._place: tuple[int | None, int] = (None, 0)
        self._new_run = True
        self._run: object = None
        self._total: int | None = None
        self.closing = contextlib.ExitStack()
        """Undoes changes when the session is closed."""
        self._shape: Any = None
        self._stale: dict[Any, _Borders] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Session:
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _no_session, ()

    def bands(self, layout: Layout, windows: Iterable[Window | None]) -> Bands:
        """Where the image of a call is cut.

        Raises:
            ValueError: it is too small for the ranks.
        """
        return cut(layout, self.links.size, self.options.shares, self.options.too_small, windows)

    def check(self, model: nn.Module, family: Family, settings: Settings) -> None:
        """Raise if a model transformed with these settings cannot be shared; see ``refuse_unshared``."""
        refuse_unshared(model, family, settings)

    # A pipeline's denoising loop

    def watch(self, pipe: Any) -> None:
        """Watch how a pipeline's denoising loop begins and ends, until the session is closed."""
        watch_loop(pipe, self)

    def enter_loop(self) -> None:
        """Called before a pipeline's first step."""
        self._place = (None, 0)
        self.links.start("the pipeline's loop before step 1")

    def leave_loop(self, error: BaseException | None) -> None:
        """Called after a pipeline's last step, or after an error or a stop that has ended its loop earlier.

        Raises:
            ParallelError: another rank is the cause.
        """
        step, _ = self._place
        if error is not None:
            if step is not None:
                self.links.notes.where = f"the pipeline's loop after step {step + 1}"
            self.failed(error)
        self.links.end(early=step is not None and self._total is not None and step < self._total - 1)
        self._place = (None, 0)

    # One call, from entry to exit

    def start(self) -> None:
        """Called before a call: count the step."""
        step = self._step()
        known, branch = self._place
        run = self.steps.run()
        self._new_run = step is None or known is None or step < known or self._total == 1 or run is not self._run
        self._run = run
        self._place = (step, branch + 1 if step == known and not self._new_run else 0)
        self._calls += 1
        where = f"call {self._calls}" if step is None else f"step {step + 1}"
        if self._new_run:
            self.links.start(where)
        self.links.notes.where = where

    def begin(
        self, model: nn.Module, kwargs: Mapping[str, Any], call: Call, family: Family, settings: Settings
    ) -> None:
        """Called when a call's arguments are known: meet the other ranks, and compare facts with them.

        Raises:
            ValueError: the call cannot run on several ranks, or ranks differ; the message names them.
            ParallelError: a rank is late, gone, or has stopped.
        """
        (step, branch), new_run = self._place, self._new_run
        mine: dict[str, Any] = {"the denoising step": step, **facts_of_call(kwargs, call, thorough=new_run)}
        if new_run and step is not None:
            mine["the number of denoising steps"] = self._total
        if new_run and (step is not None or self._calls == 1):
            mine |= facts_of_model(model, settings, self.options)
        said, anew = self.links.meet(mine)
        shape = (call.grids, call.frames, tuple(sorted(call.text_lens.items())), tuple(call.tokens.shape))
        if anew:
            self._stale.clear()
        elif new_run or shape != self._shape:
            self._forget()
        self._shape = shape
        found = differences(said, self.links.ranks)
        if found:
            raise AgreedError(
                f"{self.links.notes.where}: {found}. All ranks must work on the same image with the same model and settings"
            )
        refused = family.why_not_parallel_call(model, dict(kwargs)) or why_not_cached(model)
        if refused is not None:
            raise AgreedError(f"this call of {type(model).__name__} cannot be shared by several ranks: {refused}")
        layout = Layout(*call.grids[0], 0, family.text_first, "raster", tuple(call.grids[1:]), frames=call.frames)
        try:
            bands = self.bands(layout, (window for _, window in settings.slots))
        except ValueError as error:
            raise AgreedError(str(error)) from None
        if bands.busy < bands.ranks and not family.idles:
            raise AgreedError(
                f"an image of {call.grids[0][0]} x {call.grids[0][1]} tokens leaves {bands.ranks - bands.busy} of "
                f"{bands.ranks} ranks idle (too_small='fewer'), and {type(model).__name__} cannot run without image tokens. "
                f"Use {bands.busy} ranks, or a larger image"
            )
        self.current = BandCall(self, bands, layout, step, branch, family.text_first)

    def _step(self) -> int | None:
        try:
            step, self._total = self.steps.evaluation()
        except ValueError:
            return None
        return step

    def part(
        self,
        layout: Layout,
        window: Window | None,
        backend: str,
        kernel: Kernel,
        device: torch.device,
        text_padded: bool,
    ) -> BandPlan:
        """This rank's plan of the current call."""
        assert self.current is not None
        bands = self.current.bands
        return get_band_plan(layout, window, bands, self.links.rank, backend, kernel, device, text_padded)

    def band(
        self, plans: Sequence[Any], masks: Sequence[Any], slots: Sequence[Slot], keep: Mapping[str, Tensor]
    ) -> BandCall:
        """The current call with its plans and masks, one per slot."""
        assert self.current is not None
        self.current.plans = tuple(plans)
        self.current.keep = tuple(keep.get(scope) for scope, _ in slots)
        self.current.masks = tuple(masks)
        return self.current

    def end(self) -> None:
        """Called after a successful call."""
        self.current = None
        if self._place[0] is None:
            self.links.end()

    def failed(self, error: BaseException) -> None:
        """Called after a failure in a call or between calls: tell the others, once per run.

        Raises:
            ParallelError: another rank is the cause.
        """
        self.current = None
        self._place = (None, 0)
        try:
            if isinstance(error, AgreedError):
                self.links.end()
            else:
                self.links.fail(error)
        finally:
            self._stale.clear()

    def _forget(self) -> None:
        """Drop borders that are no longer needed; their transfers have to finish first."""
        for borders in self._stale.values():
            borders.pending.wait()
        self._stale.clear()

    def close(self) -> None:
        """Release all resources."""
        self.closing.close()
        self.current = None
        self.links.close()
        self._stale.clear()

    # Borders

    def borders(self, key: Any, step: int | None, sends: dict[int, Tensor], receives: Any, like: Tensor) -> Pending:
        """A layer's borders: those of this step, or those of the previous step while this step's are being sent."""
        if self.options.exchange == "sync" or step is None:
            return self.links.exchange(sends, receives, like)
        before = self._stale.pop(key, None)
        usable = before is not None and before.step == step - 1 and step >= self.options.warmup_steps
        last = self._total is not None and step >= self._total - 1
        if usable and last:
            assert before is not None
            return before.pending
        now = self.links.exchange(sends, receives, like)
        if not last:
            self._stale[key] = _Borders(step, now)
        if usable:
            assert before is not None
            return before.pending
        if before is not None:
            before.pending.wait()
        return now


def why_not_cached(model: nn.Module) -> str | None:
    """Why a model with one of diffusers' caches cannot be shared by several ranks; None if it has none."""
    if not getattr(model, "is_cache_enabled", False):
        return None
    return (
        "it has a cache (enable_cache), which decides from the tokens that it sees which blocks to skip, and each rank sees "
        "different ones. Call model.disable_cache() first"
    )


def refuse_unshared(model: nn.Module, family: Family, settings: Settings) -> None:
    """Raise if a transformed model cannot be shared by several ranks.

    Raises:
        ValueError: it cannot.
    """
    why = why_not_cached(model) or family.why_not_parallel(model)
    if settings.formula is not None:
        why = (
            f"attention={settings.formula.kind!r} is not softmax over a window, as CLEAR and the alternatives that are "
            "masks are"
        )
    if why is not None:
        raise ValueError(f"this {type(model).__name__} cannot be shared by several ranks: {why}")


def _no_session() -> None:
    return None
