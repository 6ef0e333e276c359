"""Stop a training run after the step in which a signal arrives."""

from __future__ import annotations

import signal
from types import FrameType


class StopFlag:
    """Inside its block, SIGTERM and SIGINT set a flag instead of ending the process. Calling the object returns the flag."""

    def __init__(self) -> None:
        self._raised = False

    def __call__(self) -> bool:
        return self._raised

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._raise) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._raised = True
