"""Error messages of the command line, and the exit statuses that go with them."""

from __future__ import annotations

import dis
import errno
import re
import sys
import types
from collections.abc import Iterator

INTERRUPTED, INTERNAL, USAGE, FAILED = 130, 70, 2, 1
"""Exit statuses. 70 is EX_SOFTWARE of sysexits.h."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|[Cc]annot allocate memory")
_RAISE = dis.opmap["RAISE_VARARGS"]


def describe(error: BaseException, interrupted: bool = False) -> tuple[str, int]:
    """Return the line that says what went wrong, and the exit status.

    An error is about the user's input if flexclear raised it with a ``raise`` of its own, or if a library raised it about a
    value or a file. Any other TypeError, KeyError and so on, ours or a library's, is an internal error and is not passed off as
    bad input.

    Args:
        error: what was raised.
        interrupted: whether Ctrl-C was pressed; libraries that are being imported turn it into other errors.
    """
    if isinstance(error, KeyboardInterrupt) or (interrupted and _from_interrupt(error)):
        return "interrupted", INTERRUPTED
    usage = getattr(error, "format_message", None)
    if usage is not None:  # From the command line's parser: typer's own click, or click itself in older releases.
        context = getattr(error, "ctx", None)
        help_at = "" if context is None else f". See {context.command_path} --help"
        return usage().rstrip(".") + help_at, USAGE
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        return f"out of memory: {text}", FAILED
    if isinstance(error, OSError):
        return text, FAILED if error.errno in _FULL else USAGE
    if _about_input(error):
        return text, USAGE
    if isinstance(error, RuntimeError | ArithmeticError) and _raised_by_us(error):
        return text, FAILED
    return (
        f"internal error ({type(error).__name__}: {text}); this is a fault of flexclear, please report it with the "
        "traceback that --debug shows",
        INTERNAL,
    )


def _about_input(error: BaseException) -> bool:
    if isinstance(error, ImportError):
        return not (error.name or "").startswith("flexclear")
    if not isinstance(error, ValueError | TypeError):
        return False
    if not _raised_by_us(error):
        return isinstance(error, ValueError) and not _in_flexclear(error)
    # A reader of settings re-raises a TypeError with the file's name in front of its text.
    cause = error.__cause__
    if isinstance(error, TypeError) and isinstance(cause, TypeError) and str(cause) in str(error):
        return _about_input(cause)
    return True


def _innermost(error: BaseException) -> types.TracebackType | None:
    found = error.__traceback__
    while found is not None and found.tb_next is not None:
        found = found.tb_next
    return found


def _in_flexclear(error: BaseException) -> bool:
    found = _innermost(error)
    return found is not None and str(found.tb_frame.f_globals.get("__name__")).partition(".")[0] == "flexclear"


def _raised_by_us(error: BaseException) -> bool:
    """Whether a ``raise`` statement in flexclear raised it, rather than a failed operation."""
    found = _innermost(error)
    return found is not None and _in_flexclear(error) and found.tb_frame.f_code.co_code[found.tb_lasti] == _RAISE


def _from_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C caused it. Modules in C and C++ raise ImportError or SystemError instead, some without a cause."""
    return isinstance(error, ImportError | SystemError) or any(
        isinstance(one, KeyboardInterrupt) for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def show_traceback(error: BaseException) -> None:
    """Print it on standard error."""
    import traceback

    traceback.print_exception(error, file=sys.stderr)
