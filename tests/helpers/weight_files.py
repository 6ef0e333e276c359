"""Weight files in the released layout, and helpers for their tests."""

from __future__ import annotations

import json
import struct

import torch
from safetensors.torch import save_file

import flexclear
from flexclear.masks import Disc
from flexclear.runtime.hooks import entry_hook_of

from helpers.models import flux_call, tiny_flux

CPU = torch.device("cpu")
WIDTH = 16
DOUBLE = [f"transformer_blocks.{index}" for index in range(19)]
SINGLE = [f"single_transformer_blocks.{index}" for index in range(38)]
LAST = "single_transformer_blocks.1.attn.to_v.bias"


class Foreign(Disc):
    """A custom window class."""


def full_flux(seed=0, **config):
    """FLUX.1-dev's 19 + 38 blocks, one head wide."""
    return tiny_flux(seed, num_layers=19, num_single_layers=38, num_attention_heads=1, guidance_embeds=True, **config)


def released(down_factor=None, seed=1, width=WIDTH, dtype=torch.float32, double=DOUBLE, single=SINGLE):
    """Tensors under the names of the released files, written out by hand."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return (torch.randn(shape, generator=generator) / 4).to(dtype)

    tensors = {}
    for block in double + single:
        for part in ["to_q", "to_k", "to_v"] + (["to_out.0"] if block in double else []):
            tensors[f"{block}.attn.{part}.weight"] = noise(width, width)
            tensors[f"{block}.attn.{part}.bias"] = noise(width)
        if down_factor is not None:
            tensors[f"{block}.attn.processor.spatial_weight"] = noise(1, 1, 1, down_factor, 1, down_factor, 1).abs()
    return tensors


def raw_header(path):
    """Metadata, and the shape and type of every tensor, read from the file's bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return header.pop("__metadata__", {}), {key: (tuple(t["shape"]), t["dtype"]) for key, t in header.items()}


def windows_of(model):
    return dict(entry_hook_of(model).settings.windows)


def snapshot(model):
    """Everything that a failed call must leave unchanged."""
    return (
        {key: tensor.clone() for key, tensor in model.state_dict().items()},
        {name: id(processor) for name, processor in model.attn_processors.items()},
        [id(hook) for hook in model._forward_pre_hooks.values()],
        [type(hook) for hook in model._forward_hooks.values()],
    )


def assert_unchanged(model, before):
    state, *rest = snapshot(model)
    assert list(state) == list(before[0])
    assert all(torch.equal(state[key], before[0][key]) for key in state)
    assert tuple(rest) == before[1:]


def run(model, call):
    """The model's output; through masked SDPA, so that nothing is compiled."""
    if entry_hook_of(model) is not None and entry_hook_of(model).settings.backend == "auto":
        flexclear.transform(model, r=windows_of(model), backend="sdpa")
    with torch.no_grad():
        return model(**call).sample


CALL = {**flux_call(8, 6, 5), "guidance": torch.tensor([3.5])}


def tiny_file(path, down_factor=None, metadata=None, change=None, **options):
    """A file for the ``model`` fixture; ``change`` edits its tensors first."""
    tensors = released(down_factor, double=DOUBLE[:2], single=SINGLE[:2], **options)
    if change is not None:
        change(tensors)
    save_file(tensors, path, metadata)
    return path


def with_lora(model):
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False), "style")
    return model


def grouped(model, **options):
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1, **options
    )
