"""Running the command line in this process: interrupts, lines on standard error, exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn


class _Interrupts:
    """Remember Ctrl-C, and raise it again if it was lost."""

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> _Interrupts:
        self._handler, self._hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
        # Only if the handler is Python's own: code that ignores or handles the signal has its reasons.
        self._ours = (
            threading.current_thread() is threading.main_thread() and self._handler is signal.default_int_handler
        )
        if self._ours:
            signal.signal(signal.SIGINT, self._raise)
            sys.unraisablehook = self._lost
        return self

    def __exit__(self, *error: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._handler)
            sys.unraisablehook = self._hook

    def _raise(self, number: int, frame: Any) -> NoReturn:
        self.seen = True
        raise KeyboardInterrupt

    def _lost(self, lost: Any) -> None:
        # In a destructor or a weak reference's callback, of which the import system has many, it would be printed and
        # forgotten. Raise it again when the callback is over.
        if issubclass(lost.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.01, signal.raise_signal, (signal.SIGINT,))
            again.daemon = True
            with contextlib.suppress(RuntimeError):  # The interpreter is ending: there is nothing left to interrupt.
                again.start()
        else:
            self._hook(lost)


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """See ``flexclear.cli.main``."""
    with _Interrupts() as interrupts:
        try:
            from flexclear.commands.terminal import lines_of_a_command

            with lines_of_a_command():
                status = _run(sys.argv[1:] if arguments is None else list(arguments), interrupts)
        except KeyboardInterrupt:
            status = 130
    sys.exit(status)


def _run(arguments: list[str], interrupts: _Interrupts) -> int:
    from flexclear.commands.terminal import PROGRAM, output

    try:
        from flexclear.commands.application import app
        from flexclear.common.reading import check_unicode

        for argument in arguments:
            check_unicode(argument, "an argument")

        status = app(args=arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BrokenPipeError:
        _ignore_standard_output()
        return 1
    except BaseException as error:
        from flexclear.commands.failures import describe, show_traceback

        _ignore_standard_output()
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2

        line, status = describe(error, interrupts.seen)
        if output.debug:
            show_traceback(error)
        output.say(line)
        return status


def _ignore_standard_output() -> None:
    """Keep the interpreter from complaining at exit if standard output cannot take what is still to be written."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
