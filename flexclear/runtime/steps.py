"""Which denoising step a call belongs to, read from the pipeline's scheduler."""

from __future__ import annotations

import weakref
from typing import Any

FRAMES_APART = "SkyReelsV2DiffusionForcing"
"""Prefix of the names of pipelines that denoise each frame with its own copy of the scheduler, and never advance the original."""


class StepCounter:
    """Knows the current step of a pipeline; without a pipeline it knows no step.

    The scheduler is looked up in each call, because users replace it (``pipe.scheduler = ...``). The pipeline is held
    weakly, and is not pickled. Deep copies of the model share it; in a deep copy of the pipeline, its copy counts.
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._run: Any = None
        self._begin: int | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> StepCounter:
        pipeline = None if self._pipeline is None else self._pipeline()
        copied = None if pipeline is None else memo.get(id(pipeline))
        return self if copied is None else StepCounter(copied)

    def __reduce__(self) -> tuple[type[StepCounter], tuple[()]]:
        return StepCounter, ()

    def current(self) -> tuple[int, int]:
        """Index of the current step, from 0, and number of steps of the run.

        A scheduler of order 2, such as Heun's, evaluates the model twice in each step but the last.

        Raises:
            ValueError: there is no pipeline (any more), or its scheduler does not count steps.
        """
        number, total, order = self._counted()
        return number // order, -(-total // order)

    def evaluation(self) -> tuple[int, int]:
        """Index of the current evaluation of the model, from 0, and number of evaluations of the run; guidance with several
        prompts counts as one.

        Raises:
            ValueError: see ``current``.
        """
        return self._counted()[:2]

    def _counted(self) -> tuple[int, int, int]:
        """Index of the evaluation, number of all evaluations, and number of evaluations per step."""
        pipeline = None if self._pipeline is None else self._pipeline()
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is None:
            raise ValueError(
                "dense_steps counts denoising steps, so flexclear.transform must be given the pipeline, whose scheduler "
                "counts them, and the pipeline must still exist; the bare model does not know its step"
            )
        timesteps = getattr(scheduler, "timesteps", None)
        if type(pipeline).__name__.startswith(FRAMES_APART):
            raise ValueError(
                f"dense_steps counts denoising steps by the pipeline's scheduler, and a {type(pipeline).__name__} has one of its "
                "own for each frame, which is at another step. Leave dense_steps out"
            )
        if timesteps is None or not hasattr(scheduler, "step_index"):
            raise ValueError(
                f"dense_steps needs a scheduler that counts steps (step_index); {type(scheduler).__name__} does not"
            )
        at, begin = scheduler.step_index, getattr(scheduler, "begin_index", None)
        if begin is None:
            begin = self._begin_of(pipeline, timesteps, at)
        return (begin if at is None else at) - begin, len(timesteps) - begin, getattr(scheduler, "order", 1)

    def _begin_of(self, pipeline: Any, timesteps: Any, at: int | None) -> int:
        """Where in the schedule a run begins whose pipeline does not tell its scheduler. Most begin at 0, but some skip steps
        (``strength`` of Wan's video to video, ``denoise_strength`` of LTX), which only shows after their first step."""
        if at is None:
            self._run, self._begin = timesteps, None
        elif self._run is timesteps and self._begin is None:
            self._begin = at - 1
        if self._run is timesteps and self._begin is not None:
            return self._begin
        left = getattr(pipeline, "_num_timesteps", None) if hasattr(pipeline, "get_timesteps") else None
        return 0 if left is None else max(len(timesteps) - left, 0)

    def run(self) -> object:
        """An object that the pipeline's scheduler creates for each run; None if steps are not counted."""
        pipeline = None if self._pipeline is None else self._pipeline()
        return getattr(getattr(pipeline, "scheduler", None), "timesteps", None)

    def is_dense(self, dense_steps: tuple[int, int]) -> bool:
        """Whether the current step is among the (first, last) dense ones."""
        if dense_steps == (0, 0):
            return False
        step, total = self.current()
        return step < dense_steps[0] or step >= total - dense_steps[1]
