"""Stop a training run after the step in which a signal arrives."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopFlag:
    """Inside its block, the first SIGTERM or SIGINT sets a flag instead of ending the process; calling the object returns the
    flag. A second one does what it would have done outside. Threads other than the main one get no signals, and no flag.
    """

    def __init__(self) -> None:
        self._raised = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._raised

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._raise) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._raised = True
        signal.signal(number, self._before[number])
