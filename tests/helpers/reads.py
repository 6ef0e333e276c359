"""What a call copies from the device to Python."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"}
"""Operators that copy a tensor's contents to Python, and so would wait for a GPU."""


class Reads(TorchDispatchMode):
    """Counts the operators of ``READS``."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.removeprefix("aten::") in READS
        return function(*args, **(kwargs or {}))


def reads_of(model, call):
    with Reads() as reads:
        model(**call)
    return reads.count


def made_here(call):
    """The call's tensors as a pipeline under inference mode makes them."""
    return tree_map_only(torch.Tensor, torch.clone, call)
