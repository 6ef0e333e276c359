"""What goes wrong between ranks."""

from __future__ import annotations


class ParallelError(RuntimeError):
    """Another rank is gone, late, stopped, or works on something else. The message names the rank and the step."""


class AgreedError(ValueError):
    """Something that all ranks have found out alike, so that none needs to tell the others."""
