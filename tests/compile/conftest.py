"""The model that is quantised beside everything else."""

from __future__ import annotations

import pytest
import torch
from eight_bit import ATTENTION, lora_file

from models import tiny_flux


@pytest.fixture(scope="module")
def base():
    """A FLUX of 1 + 1 blocks, 4 heads x 64, bfloat16, whose blocks do something."""
    model = tiny_flux(
        num_attention_heads=4, attention_head_dim=64, axes_dims_rope=(16, 24, 24), num_layers=1, num_single_layers=1
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.to(torch.bfloat16)


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
