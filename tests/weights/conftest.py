"""The small FLUX that weights are loaded into."""

from __future__ import annotations

import pytest

from helpers.models import tiny_flux


@pytest.fixture
def model():
    return tiny_flux(num_attention_heads=1)
