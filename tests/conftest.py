"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch: workers, and what they start, share the cores
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("flexclear", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("flexclear")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
