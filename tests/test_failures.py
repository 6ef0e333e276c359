"""What goes wrong on the command line: one line on standard error, an exit status, and a traceback on request only."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from flexclear import cli
from flexclear.commands import failures
from flexclear.masks.checks import check_int

EXPLAIN = ("explain", "--height", "64", "--width", "64")


@pytest.fixture
def failing(monkeypatch, capsys):
    """Runs ``flexclear explain`` with a function in place of its work: exit status and lines on standard error."""

    def run(work, *options):
        monkeypatch.setattr("flexclear.explanation.window.explain_window", work)
        with pytest.raises(SystemExit) as end:
            cli.main([*EXPLAIN, *options])
        captured = capsys.readouterr()
        assert captured.out == ""
        return end.value.code, captured.err.splitlines()

    return run


def raising(error):
    def work(*args, **kwargs):
        raise error

    return work


def our_fault(*args, **kwargs):
    return kwargs["px_per_token"] + "16"


def our_lookup(*args, **kwargs):
    return {}["missing"]


def our_unpacking(*args, **kwargs):
    first, second = (1,)
    return first, second


OUTSIDE = {
    "disk full": (raising(OSError(28, "No space left on device", "x.png")), 1, "No space left on device: 'x.png'"),
    "no permission": (raising(PermissionError(13, "Permission denied", "x")), 2, "Permission denied: 'x'"),
    "memory": (raising(MemoryError()), 1, "out of memory: MemoryError"),
    "memory of CUDA": (
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20.00 GiB.")),
        1,
        "out of memory: CUDA out of memory. Tried to allocate 20.00 GiB.",
    ),
    "memory of the CPU": (
        lambda *args, **kwargs: torch.empty(2**60, dtype=torch.uint8),
        1,
        "allocate memory: you tried to allocate 1152921504606846976 bytes",
    ),
    "interrupt": (raising(KeyboardInterrupt()), 130, "interrupted"),
    "a value that a library refuses": (lambda *args, **kwargs: __import__("fractions").Fraction("a"), 2, "'a'"),
    "a value that we refuse": (lambda *args, **kwargs: check_int("r", 0, 1, None, "in tokens"), 2, "r must be an int"),
    "a type that we refuse": (lambda *args, **kwargs: check_int("r", "1", 1, None, "in tokens"), 2, "got '1' (str)"),
}


@pytest.mark.parametrize(("work", "status", "message"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_is_not_our_fault_is_one_line(failing, work, status, message):
    code, lines = failing(work)
    assert code == status
    assert len(lines) == 1
    assert lines[0].startswith("flexclear: ")
    assert message in lines[0]
    assert "internal" not in lines[0]


INSIDE = {
    "type": (our_fault, "TypeError: unsupported operand"),
    "lookup": (our_lookup, "KeyError: 'missing'"),
    "value": (our_unpacking, "ValueError: not enough values to unpack"),
    "recursion": (lambda *args, **kwargs: (f := lambda n: f(n + 1))(0), "RecursionError: maximum recursion depth"),
    "a library's type": (lambda *args, **kwargs: torch.nn.Linear(2, "3"), "TypeError: "),
    "an import of ours": (lambda *args, **kwargs: __import__("flexclear.no_such_module"), "ModuleNotFoundError: "),
}


@pytest.fixture
def ours(monkeypatch):
    """The functions of this file count as flexclear's."""
    monkeypatch.setitem(our_fault.__globals__, "__name__", "flexclear.somewhere")


@pytest.mark.parametrize(("work", "message"), INSIDE.values(), ids=INSIDE)
def test_a_fault_of_our_own_is_not_passed_off_as_bad_input(failing, ours, work, message):
    code, lines = failing(work)
    assert code == 70
    assert len(lines) == 1
    assert lines[0].startswith("flexclear: internal error (")
    assert message in lines[0]
    assert "--debug" in lines[0]


@pytest.mark.parametrize("error", [TypeError("r must be 1"), ValueError("r must be 1"), RuntimeError("r must be 1")])
def test_what_we_raise_ourselves_is_not_a_fault_of_our_own(failing, ours, error):
    code, lines = failing(raising(error))
    assert (code, lines) == (1 if isinstance(error, RuntimeError) else 2, ["flexclear: r must be 1"])


def test_a_fault_stays_one_where_a_reader_adds_the_file_s_name(failing, ours):
    def read(*args, **kwargs):
        try:
            our_fault(*args, **kwargs)
        except TypeError as error:
            raise type(error)(f"settings.yaml: {error}") from error

    def parse(*args, **kwargs):
        try:
            our_unpacking()
        except ValueError as error:
            raise ValueError(f"a pair is needed: {error}") from error

    assert failing(read)[0] == 70
    assert failing(parse)[0] == 2, "what is caught to be explained is explained"


@pytest.mark.parametrize("place", [(*EXPLAIN, "--debug"), ("--debug", *EXPLAIN)], ids=["after", "before"])
def test_debug_shows_the_traceback(monkeypatch, capsys, place):
    monkeypatch.setattr("flexclear.explanation.window.explain_window", raising(OSError(28, "No space left")))
    with pytest.raises(SystemExit) as end:
        cli.main(place)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "flexclear: [Errno 28] No space left"
    with pytest.raises(SystemExit):
        cli.main(EXPLAIN)
    assert len(capsys.readouterr().err.splitlines()) == 1, "--debug is for one run"


def test_an_error_that_an_interrupt_became_is_an_interrupt():
    chained = RuntimeError("could not import")
    chained.__cause__ = KeyboardInterrupt()
    for error in (ImportError("initialization failed"), SystemError("error return without exception set"), chained):
        assert failures.describe(error, interrupted=True) == ("interrupted", 130)
        assert failures.describe(error, interrupted=False)[1] != 130
    assert failures.describe(OSError(28, "No space left"), interrupted=True)[1] == 1, "what came later is named"


# Sends this process a real SIGINT when the module named first is imported; "lost": from a destructor, whose exceptions
# Python prints and forgets.
INTERRUPTED = """
import os, signal, sys, time
module, how, *arguments = sys.argv[1:]

class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            if how == "lost":
                Lost()
            else:
                os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
from flexclear.cli import main
main(arguments)
"""


@pytest.mark.parametrize(
    ("module", "how"),
    [
        ("flexclear.commands.running", "raised"),
        ("typer", "raised"),
        ("typer", "lost"),
        ("flexclear.commands.fuzz", "lost"),
        ("torch", "raised"),
        ("torch._C", "raised"),
        ("diffusers", "raised"),
    ],
)
def test_an_interrupt_while_importing_is_one_line_at_most(tmp_path, module, how):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, how, "generate", "embedded", "--prompt", "a red apple"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    assert done.stderr in ("", "flexclear: interrupted\n")
    assert not list(tmp_path.iterdir())


def shell(command):
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.splitlines()


def test_a_full_disk_under_standard_output_is_one_line():
    status, lines = shell(f"{sys.executable} -m flexclear --help > /dev/full")
    assert status == 1
    assert lines == ["flexclear: [Errno 28] No space left on device"]


def test_a_closed_pipe_says_nothing():
    status, lines = shell(f"{sys.executable} -m flexclear --help | true; echo ${{PIPESTATUS[0]}} >&2")
    assert status == 0
    assert lines in (["0"], ["1"]), "0 where all of it fitted into the pipe before its end was closed"
