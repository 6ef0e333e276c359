"""What goes wrong between ranks."""

from __future__ import annotations


class ParallelError(RuntimeError):
    """Another rank is gone, late, has stopped, or works on something else. The message names the rank and the step."""


class AgreedError(ValueError):
    """An error that all ranks have found on their own, so that none needs to tell the others."""
