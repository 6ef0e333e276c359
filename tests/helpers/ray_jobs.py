"""Jobs for a crew that take no time; workers write what they do into a folder."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Note:
    """Work that records each call that it begins in ``folder``. A call's payload: text, seconds, and what happens.

    ``files`` is what ``look`` should find, ``found`` what it finds; ``by_process``: whether workers report a value that differs;
    ``load``: what happens on loading.
    """

    folder: str
    files: tuple[str, ...] = ("same",)
    found: tuple[str, ...] = ("same",)
    by_process: bool = False
    load: str = ""

    def look(self):
        return self.found

    def open(self):
        if self.load == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.load == "raises":
            raise ValueError("no such weights here")
        return _Noting(Path(self.folder), {"pid": os.getpid()} if self.by_process else {"r": 8})


class _Noting:
    def __init__(self, folder, told):
        self._folder, self.told, self.remarks = folder, told, ["loaded"]

    def run(self, payload):
        text, seconds, happens = payload
        with (self._folder / text).open("a") as notes:
            notes.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        times = len((self._folder / text).read_text().splitlines())
        if happens == "dies" or (happens == "dies once" and times == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if happens == "raises":
            raise MemoryError("CUDA out of memory, or so")
        return text, os.getpid()
