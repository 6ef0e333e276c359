"""Waiting for C++ code without missing Ctrl-C or other ranks' notes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

POLL = 0.2
"""Seconds between checks for other events."""


def wait_for(call: Callable[[], Result], seconds: float, watch: Callable[[], None] | None = None) -> Result:
    """Run ``call()`` in a separate thread, which is abandoned if it takes too long.

    Args:
        call: function that blocks without holding the interpreter's lock.
        seconds: how long to wait for it.
        watch: called every ``POLL`` seconds; an exception ends the wait.

    Raises:
        TimeoutError: it took longer.
    """
    found: list[Result] = []
    raised: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            raised.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="flexclear-wait", daemon=True).start()
    end = time.monotonic() + seconds
    while not done.wait(POLL):
        if time.monotonic() > end:
            raise TimeoutError(f"no answer within {seconds:g} s")
        if watch is not None:
            watch()
    if raised:
        raise raised[0]
    return found[0]
