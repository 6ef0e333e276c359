"""Errors between ranks."""

from __future__ import annotations


class ParallelError(RuntimeError):
    """Another rank is gone, late, has stopped, or works on something else. The message names the rank and the step."""


class AgreedError(ValueError):
    """An error that every rank finds on its own, so that no rank needs to tell the others."""
