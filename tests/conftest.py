"""Settings and fixtures that all tests share."""

from __future__ import annotations

import fnmatch
import getpass
import logging
import os
import signal
import sys
import tempfile

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch: workers, and what they start, share the cores
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # Inductor's cache does not know it, and kernels that were compiled under another one crash.
    own = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", own)

# What was measured and tuned on this machine is not for tests, nor theirs for it.
os.environ["FLEXCLEAR_CACHE"] = os.path.join(
    tempfile.gettempdir(), f"flexclear_tests_{getpass.getuser()}_{os.getpid()}"
)

# A shell that starts tests in its background has them ignore SIGINT, and all that they start, which some tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("flexclear", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("flexclear")


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="run the costly cases of every model family too")


LONGEST = (
    "test_kernels_without_gpu.py",
    "compile/test_text_lengths.py",
    "contract/test_compile.py",
    "compile/test_flex.py",
    "test_on_paper.py",
    "distill/test_students_again.py",
    "embedded/test_pictures.py",
    "plugins/test_compile_whole.py",
    "parallel/test_ends.py",
    "compile/test_quantize_together.py",
    "parallel/test_more_processes.py",
    "distill/test_processes.py",
    "test_soak.py",
    "compile/test_modes.py",
    "compile/test_regional.py",
    "testing/test_fuzzing.py",
    "distill/test_trainer.py",
    "test_reliability.py",
    "distill/test_config.py",
    "test_synchronization.py",
    "test_students.py",
    "distill/test_deepspeed.py",
)
"""Files that take longest, in falling order. Processes that take a file each (``make test``) begin with them, so that none is
left with one of these alone at the end."""


def pytest_collection_modifyitems(config, items):
    place = {os.path.join(os.path.dirname(__file__), *name.split("/")): rank for rank, name in enumerate(LONGEST)}
    assert all(map(os.path.isfile, place)), "a file of LONGEST is gone"
    items.sort(key=lambda item: place.get(str(item.path), len(place)))
    if config.getoption("--whole"):
        return
    left_out = {item for item in items if left_out_of_the_suite(item)}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def left_out_of_the_suite(item):
    """Whether a test is left to ``--whole``: a case that its mark ``kept`` does not name; of the contract, a costly one, of a
    family that its mark does not name, or one of a brief family (``Row.brief``) and not marked to run for those, or not with
    these parameters."""
    kept = item.get_closest_marker("kept")
    if kept is not None:
        case = item.callspec.id if hasattr(item, "callspec") else ""
        return not any(fnmatch.fnmatchcase(case, pattern) for pattern in kept.args)
    row = item.callspec.params.get("row") if hasattr(item, "callspec") else None
    if not hasattr(row, "brief"):  # none, or another kind of row
        return False
    costly, brief = (item.get_closest_marker(name) for name in ("costly", "brief"))
    if costly is not None and row.name not in costly.args:
        return True
    return row.brief and (brief is None or not all(part in item.callspec.id for part in brief.args))


def shared_settings():
    """What a whole process shares and a test may not leave changed: the next one would see it."""
    settings = {"gradients": torch.is_grad_enabled(), "default type": torch.get_default_dtype()}
    for name in ("diffusers", "transformers"):
        propagates = name == "transformers" and os.environ.get("CI", "").upper() in {"1", "ON", "YES", "TRUE"}
        settings[name] = logging.WARNING, propagates, True  # as it comes: level, whether to propagate, progress bars
        if (library := sys.modules.get(f"{name}.utils.logging")) is not None:
            logger = logging.getLogger(name)
            settings[name] = logger.level, logger.propagate, library.is_progress_bar_enabled()
    return settings


@pytest.fixture(autouse=True)
def _alone():
    """Each test has its seed, and leaves to the next one what it has found."""
    torch.manual_seed(0)
    threads, before = torch.get_num_threads(), shared_settings()
    yield
    torch.set_num_threads(threads)  # which commands set that are run in this process
    after = shared_settings()
    torch.set_grad_enabled(before["gradients"])
    torch.set_default_dtype(before["default type"])
    changed = {name: (value, after[name]) for name, value in before.items() if after[name] != value}
    assert not changed, f"the test has changed for its whole process: {changed}"
