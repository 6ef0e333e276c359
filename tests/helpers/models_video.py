"""Scaled-down video models of diffusers whose self-attention is over the video's tokens alone, and calls as their pipelines
make them. Sides are always in tokens."""

from __future__ import annotations

import torch

from .models_latents import CHANNELS, TEXT, noise, settle, text_mask

WAN = {
    "num_attention_heads": 2,
    # Different from all sides of the tests' videos: the rotary embedding is a view with such sizes, and Dynamo takes equal
    # sizes for the same symbol.
    "attention_head_dim": 20,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 2,
}

WAN_64 = {"attention_head_dim": 64}

CONTROL = 6
"""Channels of VACE's control video."""

SOUND = 11
"""Sound tokens of LTX-2."""


def tiny_wan(seed=0, **config):
    """A WanTransformer3DModel of 2 blocks, 2 heads x 20, patches of 1 x 2 x 2."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return settle(WanTransformer3DModel(**{**WAN, **config}), seed)


def tiny_vace(seed=0, **config):
    """A WanVACETransformer3DModel of 2 blocks, and of 2 over its control video."""
    from diffusers import WanVACETransformer3DModel

    torch.manual_seed(seed)
    sizes = {**WAN, "vace_layers": [0, 1], "vace_in_channels": CONTROL}
    return settle(WanVACETransformer3DModel(**{**sizes, **config}), seed)


def tiny_skyreels(seed=0, **config):
    """A SkyReelsV2Transformer3DModel of 2 blocks, 2 heads x 20, patches of 1 x 2 x 2."""
    from diffusers import SkyReelsV2Transformer3DModel

    torch.manual_seed(seed)
    return settle(SkyReelsV2Transformer3DModel(**{**WAN, **config}), seed)


def tiny_ltx(seed=0, **config):
    """An LTXVideoTransformer3DModel of 2 blocks, 2 heads x 16."""
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": TEXT,
    }
    return settle(LTXVideoTransformer3DModel(**{**sizes, **config}), seed)


LTX_64 = {"attention_head_dim": 64, "cross_attention_dim": 128}


def tiny_ltx2(seed=0, **config):
    """An LTX2VideoTransformer3DModel of 2 blocks, 2 heads x 16, and 2 x 8 for its sound."""
    from diffusers import LTX2VideoTransformer3DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": CHANNELS,
        "audio_out_channels": CHANNELS,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": TEXT,
    }
    return settle(LTX2VideoTransformer3DModel(**{**sizes, **config}), seed)


def video(generator, frames, height, width, batch, channels=CHANNELS, dtype=torch.float32):
    """Latents of a video, in patches of 1 x 2 x 2."""
    return noise(generator, batch, channels, frames, 2 * height, 2 * width, dtype=dtype)


def wan_call(frames, height, width, text_len, batch=1, seed=0, dtype=torch.float32, *, times="samples"):
    """Keyword arguments of a call.

    Args:
        times: ``"samples"``: a timestep per sample; ``"tokens"``: one per token, 0 in the first frame (Wan 2.2 TI2V).
    """
    generator = torch.Generator().manual_seed(seed)
    timestep = torch.linspace(300.0, 700.0, batch)
    if times == "tokens":
        timestep = timestep[:, None].repeat(1, frames * height * width)
        timestep[:, : height * width] = 0
    return {
        "hidden_states": video(generator, frames, height, width, batch, dtype=dtype),
        "timestep": timestep,
        "encoder_hidden_states": noise(generator, batch, text_len, TEXT, dtype=dtype),
    }


def vace_call(frames, height, width, text_len, batch=1, seed=0, dtype=torch.float32):
    """Keyword arguments of a call with a control video of the same size."""
    generator = torch.Generator().manual_seed(seed + 1)
    control = video(generator, frames, height, width, batch, CONTROL, dtype)
    return {**wan_call(frames, height, width, text_len, batch, seed, dtype), "control_hidden_states": control}


def skyreels_call(frames, height, width, text_len, batch=1, seed=0, dtype=torch.float32, *, times="samples"):
    """Keyword arguments of a call; ``times="frames"``: a timestep per frame (diffusion forcing)."""
    call = wan_call(frames, height, width, text_len, batch, seed, dtype)
    call["timestep"] = call["timestep"].long()
    if times == "frames":
        later = 40 * torch.arange(frames)
        return {**call, "timestep": call["timestep"][:, None] + later, "enable_diffusion_forcing": True}
    return call


def ltx_call(frames, height, width, text_len, batch=1, seed=0, dtype=torch.float32):
    """Keyword arguments of a call of LTXImageToVideoPipeline: timesteps are 0 in the first frame."""
    generator = torch.Generator().manual_seed(seed)
    tokens = frames * height * width
    timestep = torch.linspace(300.0, 700.0, batch)[:, None].repeat(1, tokens)
    timestep[:, : height * width] = 0
    return {
        "hidden_states": noise(generator, batch, tokens, CHANNELS, dtype=dtype),
        "encoder_hidden_states": noise(generator, batch, text_len, TEXT, dtype=dtype),
        "timestep": timestep,
        "encoder_attention_mask": text_mask(text_len, batch, padded=True),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def ltx2_call(frames, height, width, text_len, batch=1, seed=0, dtype=torch.float32):
    """Keyword arguments of a call, with sound."""
    generator = torch.Generator().manual_seed(seed + 1)
    call = ltx_call(frames, height, width, text_len, batch, seed, dtype)
    del call["rope_interpolation_scale"]
    return {
        **call,
        "audio_hidden_states": noise(generator, batch, SOUND, CHANNELS, dtype=dtype),
        "audio_encoder_hidden_states": noise(generator, batch, text_len, TEXT, dtype=dtype),
        "audio_timestep": torch.linspace(300.0, 700.0, batch),
        "audio_encoder_attention_mask": call["encoder_attention_mask"],
        "audio_num_frames": SOUND,
    }
