"""Independence from the caller's settings: a default device, inference mode, transforms of ``torch.func``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def independent(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``function`` with the CPU as default device and outside inference mode and ``torch.func``, whatever the caller has set.

    Its results are cached and outlive the call: a tensor made in inference mode could never be saved for a backward pass, one
    made under ``torch.set_default_device("cuda")`` would be combined with others on the CPU, and one made under
    ``torch.func.grad`` is invalid once that returns.
    """

    @functools.wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.device("cpu"), torch.inference_mode(False), temporarily_clear_interpreter_stack():
            return function(*args, **kwargs)

    return wrapped
