"""``flexclear.parallel.check`` as torchrun starts it: on CPUs over gloo, on GPUs over NCCL with compiled attention."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from helpers.parallel_group import free_port


def check(processes, *options):
    start = ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, "-m", *start, "-m", "flexclear.parallel.check", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@pytest.mark.kept
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device it runs on as many of these")
def test_random_shared_models_are_the_whole_ones():
    said = check(2, "--cases", "4", "--seed", "3", "--backend", "sdpa")
    assert "4 cases on 2 ranks: all equal" in said
    assert {exchange for exchange in ("sync", "stale") if f", {exchange}, " in said} == {"sync", "stale"}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL and the overlap of stale borders need two CUDA devices")
def test_random_shared_models_are_the_whole_ones_on_gpus():
    devices = torch.cuda.device_count()
    said = check(devices, "--cases", "6", "--seed", "3", "--backend", "flex")
    assert f"6 cases on {devices} ranks: all equal" in said
    assert {exchange for exchange in ("sync", "stale") if f", {exchange}, " in said} == {"sync", "stale"}
