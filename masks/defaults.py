"""Independence of what the caller has set: a default device, inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def independent(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``function`` with the CPU as default device and outside inference mode, whatever the caller has set.

    What it makes is cached and lives longer than the call: a tensor that was made in inference mode could never be
    saved for a backward pass, and one that was made under ``torch.set_default_device("cuda")`` would meet others on CPU.
    """

    @functools.wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.device("cpu"), torch.inference_mode(False):
            return function(*args, **kwargs)

    return wrapped
