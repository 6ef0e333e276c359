"""The model that is quantised beside everything else."""

from __future__ import annotations

import pytest
import torch
from eight_bit import ATTENTION, lora_file, quantizable_flux


@pytest.fixture(scope="module")
def base():
    return quantizable_flux()


@pytest.fixture
def graphs():
    """Dynamo's caches empty before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    """LoRA files over quantised and kept linears of ``base``, by name."""
    folder = tmp_path_factory.mktemp("lora")
    return {
        "first": lora_file(folder / "first.safetensors", base, 1, 4, ATTENTION),
        "second": lora_file(folder / "second.safetensors", base, 2, 2, ("attn.to_q", "proj_mlp", "attn.add_q_proj")),
        "third": lora_file(folder / "third.safetensors", base, 3, 2, ATTENTION),
        "kept too": lora_file(folder / "kept.safetensors", base, 4, 4, ("attn.to_q", "norm1.linear", "x_embedder")),
    }
