"""Scaled-down models of the real diffusers classes with random weights, and calls to feed them."""

from __future__ import annotations

import torch


def tiny_flux(seed=0, **config):
    """A FluxTransformer2DModel of 2 + 2 blocks, 2 heads x 16, random weights, in eval mode."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**{**sizes, **config}).eval()


def raster_ids(height, width, dtype=torch.float32):
    """Image position ids as diffusers' Flux pipelines make them."""
    from diffusers import FluxPipeline

    return FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", dtype)


def flux_call(height, width, text_len, batch=1, seed=0, dtype=torch.float32):
    """Keyword arguments of a FLUX call with random inputs."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "hidden_states": noise(batch, height * width, 8),
        "encoder_hidden_states": noise(batch, text_len, 12),
        "pooled_projections": noise(batch, 10),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "img_ids": raster_ids(height, width, dtype),
        "txt_ids": torch.zeros(text_len, 3, dtype=dtype),
    }
