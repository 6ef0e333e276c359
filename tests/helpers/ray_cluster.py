"""A local Ray cluster of two nodes in its own namespaces: one for network, so that it probes no other host, and one for
processes, so that all of them end with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flexclear.common.extras import is_installed

TESTS = Path(__file__).parents[1]

AS_ROOT = () if os.geteuid() == 0 else ("--map-root-user",)
ALONE = ("unshare", *AS_ROOT, "--net", "--pid", "--fork", "--kill-child", "--mount-proc")


def needs_ray():
    """Skip, with the reason, if such a cluster is not possible here."""
    if not is_installed("ray"):
        pytest.skip("Ray is not installed (extra ray)")
    try:
        tried = subprocess.run([*ALONE, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"no namespace of its own: {error}")
    if tried.returncode:
        pytest.skip(f"no namespace of its own: {tried.stderr.strip()}")


def run_alone(folder, *command):
    """The outcome of a command in its own namespaces, run in a folder with a short name, because socket paths must be short."""
    environment = {
        **os.environ,
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",  # nobody else can connect; a token would be written into the user's folder
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(TESTS),
    }
    return subprocess.run(
        [*ALONE, "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=folder,  # workers look for modules where the driver does, and the package is next to its tests
        timeout=600,
    )


def in_cluster(scenario, **given):
    """What a function of ``helpers.ray_scenarios`` returns, called with a running cluster and ``given``."""
    needs_ray()
    with tempfile.TemporaryDirectory(prefix="rc") as folder:
        result = Path(folder) / "result.json"
        run = [sys.executable, "-m", "helpers.ray_scenarios", scenario, json.dumps(given), str(result)]
        done = run_alone(folder, *run)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(result.read_text(encoding="utf-8"))
