"""Eight-bit models, LoRA files for them, and helpers of their tests."""

from __future__ import annotations

import copy

import torch
from safetensors.torch import save_file

import flexclear
from flexclear.compile import (
    quantize,
    why_not_compiled,
)

from helpers.models import flux_call, tiny_flux

CPU = torch.device("cpu")
RECIPES = ["weight_only", "int8"]
FLOOR = {"weight_only": 24.0, "int8": 28.0}
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")
WHY_NOT = why_not_compiled(CPU)


def quantizable_flux(num_single_layers=1):
    """A FLUX of 1 + 1 blocks, 4 heads x 64, bfloat16, whose blocks have an effect."""
    model = tiny_flux(
        num_attention_heads=4,
        attention_head_dim=64,
        axes_dims_rope=(16, 24, 24),
        num_layers=1,
        num_single_layers=num_single_layers,
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.to(torch.bfloat16)


def lora_file(path, model, seed, rank, layers):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(layers):
            weights[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator)
            weights[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator)
    save_file({name: weight * 0.3 for name, weight in weights.items()}, path)
    return path


def pipeline(model):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **parts)


def local(model, r=3, backend="sdpa", **options):
    """A transformed copy."""
    return flexclear.transform(copy.deepcopy(model), r=r, backend=backend, **options)


def eight_bit(model, recipe):
    quantize(model, recipe)
    return model


def run(model, dtype=torch.bfloat16, **joint):
    model = getattr(model, "transformer", model)
    with torch.no_grad():
        return model(**flux_call(9, 13, 20, dtype=dtype), joint_attention_kwargs=joint or None).sample
