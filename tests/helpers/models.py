"""Scaled-down models of the real diffusers classes with random weights, and calls for them."""

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


def tiny_flux2(seed=0, **config):
    """A Flux2Transformer2DModel of 2 + 2 blocks, 2 heads x 16, random weights, in eval mode."""
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return Flux2Transformer2DModel(**{**sizes, **config}).eval()


def flux2_call(grid, references, text_len, batch=1, seed=0):
    """Keyword arguments of a FLUX.2 call with random inputs and the ids that its pipelines make."""
    from diffusers import Flux2Pipeline

    generator = torch.Generator().manual_seed(seed)
    count = sum(height * width for height, width in (grid, *references))
    text = torch.randn(batch, text_len, 12, generator=generator)
    ids = Flux2Pipeline._prepare_latent_ids(torch.empty(batch, 1, *grid))
    if references:
        pictures = Flux2Pipeline._prepare_image_ids([torch.empty(1, 1, *size) for size in references])
        ids = torch.cat([ids, pictures.repeat(batch, 1, 1)], dim=1)
    return {
        "hidden_states": torch.randn(batch, count, 16, generator=generator),
        "encoder_hidden_states": text,
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 4.0),
        "img_ids": ids,
        "txt_ids": Flux2Pipeline._prepare_text_ids(text),
    }


def tiny_qwen(seed=0, **config):
    """A QwenImageTransformer2DModel of 2 blocks, 2 heads x 16, random weights, in eval mode."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "axes_dims_rope": (4, 6, 6),
    }
    return QwenImageTransformer2DModel(**{**sizes, **config}).eval()


def qwen_call(grid, references, text_len, batch=1, seed=0, mask=None):
    """Keyword arguments of a Qwen-Image call with random inputs."""
    generator = torch.Generator().manual_seed(seed)
    grids = (grid, *references)
    call = {
        "hidden_states": torch.randn(batch, sum(h * w for h, w in grids), 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text_len, 12, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, h, w) for h, w in grids]] * batch,
    }
    return call if mask is None else {**call, "encoder_hidden_states_mask": mask}


SD35 = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
"""Configuration that SD3.5 medium has in addition to SD3, for ``tiny_sd3``."""


def tiny_sd3(seed=0, **config):
    """A SD3Transformer2DModel of 3 blocks, 2 heads x 16, random weights, in eval mode."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 24,
    }
    model = SD3Transformer2DModel(**{**sizes, **config}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.uniform_(0.5, 2)  # norms of query and key that have an effect
    return model


def sd3_call(height, width, text_len, batch=1, seed=0):
    """Keyword arguments of a call over height x width tokens with random inputs."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": noise(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, text_len, 12),
        "pooled_projections": noise(batch, 10),
        "timestep": torch.full((batch,), 500.0),
    }


def tiny_chroma(seed=0, **config):
    """A ChromaTransformer2DModel of 2 + 2 blocks, 2 heads x 16, random weights, in eval mode."""
    from diffusers import ChromaTransformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }
    model = ChromaTransformer2DModel(**{**sizes, **config}).eval()
    torch.nn.init.normal_(model.distilled_guidance_layer.out_proj.bias)  # gates
    return model


def text_mask(kind, batch, text_len, image_len):
    """The mask of a call whose samples have different numbers of text tokens; None for ``"no mask"``."""
    if kind == "no mask":
        return None
    mask = torch.ones(batch, text_len + image_len, dtype=torch.bool)
    for sample in range(batch):
        mask[sample, text_len - 1 - (3 + 2 * sample) % text_len : text_len] = False
    return mask if kind == "bool" else mask.float()


def chroma_call(height, width, text_len, batch=1, seed=0, kind="no mask"):
    """Keyword arguments of a Chroma call with random inputs."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, height * width, 8, generator=generator),
        "encoder_hidden_states": 2 * torch.randn(batch, text_len, 12, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": raster_ids(height, width),
        "txt_ids": torch.zeros(text_len, 3),
        "attention_mask": text_mask(kind, batch, text_len, height * width),
    }


def tiny_zimage(**config):
    """A ZImageTransformer2DModel of 1 + 1 + 2 blocks, 2 heads x 16, random weights including pad tokens, in eval mode."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    sizes = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 12,
        "axes_dims": [4, 6, 6],
        "axes_lens": [200, 64, 64],
    }
    model = ZImageTransformer2DModel(**{**sizes, **config}).eval()
    torch.nn.init.normal_(model.x_pad_token)
    torch.nn.init.normal_(model.cap_pad_token)
    return model


def zimage_call(height, width, captions, seed=0):
    """Keyword arguments of a Z-Image call with random inputs, for a grid of ``height`` x ``width`` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "x": [noise(4, 1, 2 * height, 2 * width) for _ in captions],
        "t": torch.linspace(0.3, 0.7, len(captions)),
        "cap_feats": [noise(length, 12) for length in captions],
    }


def padded(length):
    """Tokens of a Z-Image image or caption with its padding."""
    return -(-length // 32) * 32
