"""Scaled-down models of the diffusers classes that take latents ``[B, C, H, W]``, and calls as their pipelines make them.

Qwen-Image 2.1 is here as well, although it takes tokens, after a causal text. Sides are always in tokens.
"""

from __future__ import annotations

import torch
from torch import nn

CHANNELS = 4
TEXT = 12
"""Channels of latents and of text embeddings."""


def settle(model: nn.Module, seed: int) -> nn.Module:
    """The model in eval mode, with no constant parameter, so that those that diffusers initializes to zero or one matter too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.std() == 0:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def noise(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def kept(text_len: int, batch: int, padded: bool) -> list[int]:
    """Unpadded text tokens of each sample: all; with ``padded`` fewer from sample to sample, but at least one."""
    return [text_len - (1 + 2 * sample) % text_len if padded else text_len for sample in range(batch)]


def text_mask(text_len: int, batch: int, padded: bool) -> torch.Tensor:
    """A tokenizer's attention mask with padding after the text, int64 ``[B, text_len]``."""
    return (torch.arange(text_len)[None] < torch.tensor(kept(text_len, batch, padded))[:, None]).long()


def tiny_auraflow(seed=0, **config):
    """An AuraFlowTransformer2DModel of 2 + 2 blocks, 2 heads x 16, for 24 x 24 tokens at most."""
    from diffusers import AuraFlowTransformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "sample_size": 32,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 24 * 24,
    }
    model = settle(AuraFlowTransformer2DModel(**{**sizes, **config}), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm1" in name:  # gates without biases, near zero
                parameter.mul_(16)
    return model


AURAFLOW_64 = {"attention_head_dim": 64, "caption_projection_dim": 128}
AURAFLOW_REGISTERS = 8
"""Number of tokens that the model puts before the text's."""


def auraflow_call(height, width, text_len, batch=1, seed=0, dtype=torch.float32):
    """Keyword arguments of a call; padding in the text is zero, without a mask."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": noise(generator, batch, CHANNELS, 2 * height, 2 * width, dtype=dtype),
        "encoder_hidden_states": noise(generator, batch, text_len, TEXT, dtype=dtype),
        "timestep": torch.linspace(0.25, 0.75, batch).to(dtype),
    }


def tiny_cogview4(seed=0, **config):
    """A CogView4Transformer2DModel of 2 blocks, 2 heads x 16."""
    from diffusers import CogView4Transformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": TEXT,
        "time_embed_dim": 16,
        "condition_dim": 4,
    }
    return settle(CogView4Transformer2DModel(**{**sizes, **config}), seed)


COGVIEW4_64 = {"attention_head_dim": 64}


def cogview4_call(height, width, text_len, batch=1, seed=0, dtype=torch.float32):
    """Keyword arguments of a call; the pipeline pads the text at its beginning and masks nothing."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([[16.0 * height, 16.0 * width]]).repeat(batch, 1).to(dtype)
    return {
        "hidden_states": noise(generator, batch, CHANNELS, 2 * height, 2 * width, dtype=dtype),
        "encoder_hidden_states": noise(generator, batch, text_len, TEXT, dtype=dtype),
        "timestep": torch.linspace(300.0, 700.0, batch),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2, dtype=dtype),
    }


def tiny_hunyuan_image(seed=0, **config):
    """A HunyuanImageTransformer2DModel of 2 + 2 blocks and a text refiner of one, 2 heads x 16."""
    from diffusers import HunyuanImageTransformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": (1, 1),
        "text_embed_dim": TEXT,
        "rope_axes_dim": (8, 8),
    }
    return settle(HunyuanImageTransformer2DModel(**{**sizes, **config}), seed)


HUNYUAN_IMAGE_64 = {"attention_head_dim": 64, "rope_axes_dim": (32, 32)}


def hunyuan_image_call(height, width, text_len, batch=1, seed=0, dtype=torch.float32, *, padded=False, glyphs=None):
    """Keyword arguments of a call.

    Args:
        padded: whether the samples' texts end early.
        glyphs: tokens of the second text, with as many channels as the first, for a model with ``text_embed_2_dim``; the
            last sample has none, like a prompt that quotes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    call = {
        "hidden_states": noise(generator, batch, CHANNELS, height, width, dtype=dtype),
        "timestep": torch.linspace(300.0, 700.0, batch).to(dtype),
        "encoder_hidden_states": noise(generator, batch, text_len, TEXT, dtype=dtype),
        "encoder_attention_mask": text_mask(text_len, batch, padded),
    }
    if glyphs:
        mask = text_mask(glyphs, batch, padded=True)
        mask[-1] = 0
        call["encoder_hidden_states_2"] = noise(generator, batch, glyphs, TEXT, dtype=dtype) * mask[..., None]
        call["encoder_attention_mask_2"] = mask
    return call


def tiny_lumina2(seed=0, **config):
    """A Lumina2Transformer2DModel of 1 + 1 + 2 blocks, 4 query and 2 key heads x 12, up to 64 x 64 tokens."""
    from diffusers import Lumina2Transformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": CHANNELS,
        "hidden_size": 48,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 16,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (200, 64, 64),
        "cap_feat_dim": TEXT,
    }
    return settle(Lumina2Transformer2DModel(**{**sizes, **config}), seed)


LUMINA2_64 = {"hidden_size": 256, "axes_dim_rope": (16, 24, 24)}


def lumina2_call(height, width, text_len, batch=1, seed=0, dtype=torch.float32, *, padded=False):
    """Keyword arguments of a call; with ``padded``, the samples' captions, which precede the images, differ in length."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": noise(generator, batch, CHANNELS, 2 * height, 2 * width, dtype=dtype),
        "timestep": torch.linspace(0.25, 0.75, batch),
        "encoder_hidden_states": noise(generator, batch, text_len, TEXT, dtype=dtype),
        "encoder_attention_mask": text_mask(text_len, batch, padded),
    }


def tiny_hidream(seed=0, **config):
    """A HiDreamImageTransformer2DModel of 2 + 2 blocks, 2 heads x 16, two experts; 256 tokens if not square."""
    from diffusers import HiDreamImageTransformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "patch_size": 2,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_channels": [TEXT, TEXT],
        "text_emb_dim": 10,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (4, 6, 6),
        "max_resolution": (32, 32),
        "llama_layers": [0, 1, 1, 0],
    }
    return settle(HiDreamImageTransformer2DModel(**{**sizes, **config}), seed)


HIDREAM_64 = {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}


def hidream_call(height, width, text_len, batch=1, seed=0, dtype=torch.float32):
    """Keyword arguments of a call whose text is three times ``text_len``: from T5, Llama's last layer, and a layer's own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": noise(generator, batch, CHANNELS, 2 * height, 2 * width, dtype=dtype),
        "timesteps": torch.linspace(300.0, 700.0, batch),
        "encoder_hidden_states_t5": noise(generator, batch, text_len, TEXT, dtype=dtype),
        "encoder_hidden_states_llama3": noise(generator, 2, batch, text_len, TEXT, dtype=dtype),
        "pooled_embeds": noise(generator, batch, 10, dtype=dtype),
    }


def hidream_text_len(model, height, width, text_len):
    """Tokens after the image's: padding, if it is not square, and three texts."""
    return 3 * text_len + (0 if height == width else model.max_seq - height * width)


def tiny_glm_image(seed=0, **config):
    """A GlmImageTransformer2DModel of 2 blocks, 2 heads x 16, and a codebook of 32 prior tokens."""
    from diffusers import GlmImageTransformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": TEXT,
        "time_embed_dim": 16,
        "condition_dim": 4,
        "prior_vq_quantizer_codebook_size": 32,
    }
    return settle(GlmImageTransformer2DModel(**{**sizes, **config}), seed)


GLM_IMAGE_64 = {"attention_head_dim": 64}


def glm_image_call(height, width, text_len, batch=1, seed=0, dtype=torch.float32):
    """Keyword arguments of a text-to-image call, with caches that are neither written nor read, as in the pipeline."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    generator = torch.Generator().manual_seed(seed)
    prior = torch.randint(0, 32, (batch, height * width), generator=generator)
    return {
        "hidden_states": noise(generator, batch, CHANNELS, 2 * height, 2 * width, dtype=dtype),
        "encoder_hidden_states": noise(generator, batch, text_len, TEXT, dtype=dtype),
        "prior_token_id": prior,
        "prior_token_drop": torch.zeros_like(prior, dtype=torch.bool),
        "timestep": torch.linspace(299.0, 699.0, batch),
        "target_size": torch.tensor([[16.0 * height, 16.0 * width]]).repeat(batch, 1).to(dtype),
        "crop_coords": torch.zeros(batch, 2, dtype=dtype),
        "kv_caches": GlmImageKVCache(num_layers=2),
    }


def tiny_ernie_image(seed=0, **config):
    """An ErnieImageTransformer2DModel of 2 blocks, 2 heads x 16."""
    from diffusers import ErnieImageTransformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "in_channels": 16,
        "out_channels": 16,
        "text_in_dim": TEXT,
        "rope_axes_dim": (4, 6, 6),
    }
    return settle(ErnieImageTransformer2DModel(**{**sizes, **config}), seed)


ERNIE_IMAGE_64 = {"hidden_size": 128, "rope_axes_dim": (16, 24, 24)}


def ernie_image_call(height, width, text_len, batch=1, seed=0, dtype=torch.float32, *, padded=False):
    """Keyword arguments of a call; texts that end early are padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    latents = noise(generator, batch, 16, height, width, dtype=dtype)
    text = noise(generator, batch, text_len, TEXT, dtype=dtype)
    return {
        "hidden_states": latents,
        "timestep": torch.linspace(300.0, 700.0, batch).to(dtype),
        "text_bth": text * text_mask(text_len, batch, padded)[..., None].to(dtype),
        "text_lens": torch.tensor(kept(text_len, batch, padded)),
    }


def tiny_qwen21(seed=0, **config):
    """A QwenImage21Transformer2DModel of 2 blocks, 2 heads x 16."""
    from diffusers import QwenImage21Transformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "context_in_dim": TEXT,
        "axes_dims_rope": (4, 6, 6),
    }
    return settle(QwenImage21Transformer2DModel(**{**sizes, **config}), seed)


QWEN21_64 = {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}


def qwen21_call(height, width, text_len, batch=1, seed=0, dtype=torch.float32, *, padded=False, references=()):
    """Keyword arguments of a call without a cache. Sides are even: a slot of the encoder is 2 x 2 tokens.

    In addition to ``text_len`` tokens, the text has the slots of ``references`` ((height, width) each) in its middle.
    """
    generator = torch.Generator().manual_seed(seed)
    grids = (*references, (height, width))
    slots = [h * w // 4 for h, w in grids]
    before = text_len // 2
    mask = [False] * before + [True] * sum(slots[:-1]) + [False] * (text_len - before)
    call = {
        "hidden_states": noise(generator, batch, 4 * sum(slots), CHANNELS, dtype=dtype),
        "encoder_hidden_states": noise(generator, batch, len(mask), TEXT, dtype=dtype),
        "timestep": torch.linspace(0.25, 0.75, batch).to(dtype),
        "img_shapes": [[(1, h, w) for h, w in grids]] * batch,
        "img_mask": torch.tensor([mask + [True] * slots[-1]] * batch),
    }
    if padded:
        behind = text_mask(text_len - before, batch, padded=True)
        call["encoder_hidden_states_mask"] = torch.cat(
            [torch.ones(batch, len(mask) - behind.shape[1]), behind], 1
        ).long()
    return call
