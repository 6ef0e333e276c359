"""Settings and fixtures that all tests share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("flexclear", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("flexclear")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
