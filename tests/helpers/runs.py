"""What distillation runs left, compared."""

import torch
from safetensors.torch import load_file


def seen(records):
    """Records without the time that they took."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def assert_same_weights(a, b):
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
