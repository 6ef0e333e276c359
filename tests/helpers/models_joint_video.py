"""Scaled-down models of the diffusers classes for videos with text in the sequence, and calls as their pipelines make them.
Frames, rows and columns are always in tokens."""

from __future__ import annotations

from typing import Any

import torch

from .models_latents import CHANNELS, TEXT, noise, settle, text_mask


def tiny_hunyuan_video(seed=0, **config):
    """A HunyuanVideoTransformer3DModel of 2 + 2 blocks and a text refiner of one, 2 heads x 16."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT,
        "pooled_projection_dim": 10,
        "rope_axes_dim": (4, 6, 6),
    }
    return settle(HunyuanVideoTransformer3DModel(**{**sizes, **config}), seed)


ROPE_64 = {"attention_head_dim": 64, "rope_axes_dim": (16, 24, 24)}


def hunyuan_video_call(frames, height, width, text_len, batch=1, seed=0, dtype=torch.float32, *, padded=False):
    """Keyword arguments of a call; with ``padded`` the samples' texts end early."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": noise(generator, batch, CHANNELS, frames, 2 * height, 2 * width, dtype=dtype),
        "timestep": torch.linspace(300.0, 700.0, batch).to(dtype),
        "encoder_hidden_states": noise(generator, batch, text_len, TEXT, dtype=dtype),
        "encoder_attention_mask": text_mask(text_len, batch, padded),
        "pooled_projections": noise(generator, batch, 10, dtype=dtype),
        "guidance": torch.full((batch,), 6000.0, dtype=dtype),
    }


def tiny_hunyuan_video15(seed=0, **config):
    """A HunyuanVideo15Transformer3DModel of 2 blocks and a text refiner of one, 2 heads x 16."""
    from diffusers import HunyuanVideo15Transformer3DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": 2 * CHANNELS + 1,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT,
        "text_embed_2_dim": TEXT,
        "image_embed_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }
    return settle(HunyuanVideo15Transformer3DModel(**{**sizes, **config}), seed)


GLYPHS, IMAGE_TOKENS = 5, 3
"""Tokens of the second text and of the encoded image in calls of HunyuanVideo 1.5."""


def hunyuan_video15_call(
    frames, height, width, text_len, batch=1, seed=0, dtype=torch.float32, *, padded=False, image=True
):
    """Keyword arguments of a call, with a second text and an encoded image in addition to the ``text_len`` tokens of text.

    Args:
        padded: whether the first text ends early.
        image: whether there is an encoded image; otherwise its tokens are zeros and masked.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": noise(generator, batch, 2 * CHANNELS + 1, frames, height, width, dtype=dtype),
        "timestep": torch.linspace(300.0, 700.0, batch).to(dtype),
        "encoder_hidden_states": noise(generator, batch, text_len, TEXT, dtype=dtype),
        "encoder_attention_mask": text_mask(text_len, batch, padded),
        "encoder_hidden_states_2": noise(generator, batch, GLYPHS, TEXT, dtype=dtype),
        "encoder_attention_mask_2": torch.ones(batch, GLYPHS, dtype=torch.int64),
        "image_embeds": noise(generator, batch, IMAGE_TOKENS, 8, dtype=dtype) * image,
    }


def tiny_cogvideox(seed=0, **config):
    """A CogVideoXTransformer3DModel of 2 blocks, 2 heads x 64, with rotary positions, as in all published ones but 2b."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(seed)
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 16,
        "text_embed_dim": TEXT,
        "num_layers": 2,
        "sample_width": 16,
        "sample_height": 12,
        "sample_frames": 9,
        "max_text_seq_length": 20,
        "use_rotary_positional_embeddings": True,
    }
    return settle(CogVideoXTransformer3DModel(**{**sizes, **config}), seed)


def cogvideox_call(frames, height, width, text_len, batch=1, seed=0, dtype=torch.float32, *, head_dim=64, patch=1):
    """Keyword arguments of a call, with the rotary embedding that the pipeline makes.

    Args:
        head_dim: head dim of the model; 0 for a model whose positions are added to its tokens.
        patch: latent frames per token.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    generator = torch.Generator().manual_seed(seed)
    call = {
        "hidden_states": noise(generator, batch, frames * patch, CHANNELS, 2 * height, 2 * width, dtype=dtype),
        "encoder_hidden_states": noise(generator, batch, text_len, TEXT, dtype=dtype),
        "timestep": torch.linspace(300.0, 700.0, batch),
        "image_rotary_emb": None,
    }
    if head_dim:
        crops = ((0, 0), (height, width))
        call["image_rotary_emb"] = get_3d_rotary_pos_embed(head_dim, crops, (height, width), frames)
    return call


def tiny_mochi(seed=0, **config):
    """A MochiTransformer3DModel of 3 blocks, 2 heads x 16."""
    from diffusers import MochiTransformer3DModel

    torch.manual_seed(seed)
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "pooled_projection_dim": 24,
        "in_channels": CHANNELS,
        "text_embed_dim": 16,  # divided into eight heads when the text is pooled
        "time_embed_dim": 8,
    }
    model = settle(MochiTransformer3DModel(**{**sizes, **config}), seed)
    with torch.no_grad():  # initially all zeros, as if every token were at the same place
        model.pos_frequencies.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
    return model


MOCHI_64 = {"attention_head_dim": 64}


def mochi_call(frames, height, width, text_len, batch=1, seed=0, dtype=torch.float32, *, padded=False):
    """Keyword arguments of a call."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": noise(generator, batch, CHANNELS, frames, 2 * height, 2 * width, dtype=dtype),
        "encoder_hidden_states": noise(generator, batch, text_len, 16, dtype=dtype),
        "timestep": torch.linspace(300.0, 700.0, batch).to(dtype),
        "encoder_attention_mask": text_mask(text_len, batch, padded).bool(),
    }


def tiny_minimax_h3(seed=0, **config):
    """A MiniMaxH3Transformer3DModel of 2 blocks and a text refiner of one, 2 heads x 16."""
    from diffusers import MiniMaxH3Transformer3DModel

    torch.manual_seed(seed)
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 32,
        "in_channels": CHANNELS,
        "audio_in_channels": 6,
        "text_dim": TEXT,
        "freq_dim": 16,
        "time_embed_hidden_dim": 24,
        "time_embed_dim": 12,
        "rope_freq_dim": 2,
    }
    return settle(MiniMaxH3Transformer3DModel(**{**sizes, **config}), seed)


MINIMAX_H3_64 = {"attention_head_dim": 64, "rope_freq_dim": 8}


def minimax_h3_call(
    frames, height, width, text_len, batch=1, seed=0, dtype=torch.float32, *, sound=4, keyframes=(), later=None
):
    """Keyword arguments of a call: text, keyframes, two channels of sound and the video in one sequence.

    Args:
        sound: audio latents of each channel.
        keyframes: where each condition frame is anchored, ``"first"`` or ``"last"``.
        later: a noise level for the video's second half, so that timesteps differ by token.
    """
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    generator = torch.Generator().manual_seed(seed)
    tags = torch.ones(text_len, dtype=torch.int64)
    positions, tags, video, audio, text, conditions, _ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        tags, frames, 2 * height, 2 * width, sound, (1, 2, 2), 2, 2, 0, keyframes
    )
    times = torch.zeros(len(positions), dtype=torch.int64)
    times[audio] = 1
    times[video[:conditions]] = 2
    levels = [0.4, 0.6, 0.999]
    if later is not None:
        times[video[conditions + (len(video) - conditions) // 2 :]] = 3
        levels.append(later)
    return {
        "hidden_states": noise(generator, batch, len(video), 4 * CHANNELS, dtype=dtype),
        "audio_hidden_states": noise(generator, batch, len(audio), 6, dtype=dtype),
        "encoder_hidden_states": noise(generator, batch, text_len, TEXT, dtype=dtype),
        "timestep": torch.tensor(levels),
        "timestep_indices": times,
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


def tiny_cosmos3(seed=0, **config):
    """A Cosmos3OmniTransformer of 2 layers, 4 query and 2 key heads x 16."""
    from diffusers import Cosmos3OmniTransformer

    torch.manual_seed(seed)
    sizes = {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 48,
        "latent_channel": CHANNELS,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "patch_latent_dim": 4 * CHANNELS,
        "rope_theta": 10000.0,
        "rope_axes_dim": (4, 2, 2),
        "vocab_size": 300,
    }
    return settle(Cosmos3OmniTransformer(**{**sizes, **config}), seed)


COSMOS3_64 = {"head_dim": 64, "rope_axes_dim": (12, 10, 10)}


def cosmos3_call(
    frames, height, width, text_len, seed=0, dtype=torch.float32, *, conditions=0, sound=0, channels=CHANNELS, fps=24.0
):
    """Keyword arguments of a call with one sample, since the model takes no more.

    Args:
        conditions: number of frames at the beginning that are given without noise.
        sound: number of sound latents after the video, for a model with ``sound_gen``.
        channels: channels of the latents.
        fps: frame rate, which determines times in the positions.
    """
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import (
        get_3d_mrope_ids_text_tokens,
        get_3d_mrope_ids_vae_tokens,
    )

    generator = torch.Generator().manual_seed(seed)
    image_len, noisy = frames * height * width, torch.arange(conditions, frames)
    of_text, offset = get_3d_mrope_ids_text_tokens(text_len, 0)
    grid = {"temporal_offset": offset + 15000, "reset_spatial_indices": True, "fps": fps, "base_fps": 24.0}
    of_video, _ = get_3d_mrope_ids_vae_tokens(frames, height, width, temporal_compression_factor=4, **grid)
    first = text_len + conditions * height * width
    call: dict[str, Any] = {
        "input_ids": torch.randint(0, 300, (text_len,), generator=generator),
        "text_indexes": torch.arange(text_len),
        "und_len": text_len,
        "vision_tokens": [noise(generator, 1, channels, frames, 2 * height, 2 * width, dtype=dtype)],
        "vision_token_shapes": [(frames, height, width)],
        "vision_sequence_indexes": torch.arange(text_len, text_len + image_len),
        "vision_mse_loss_indexes": torch.arange(first, text_len + image_len),
        "vision_timesteps": torch.full((len(noisy) * height * width,), 400.0),
        "vision_noisy_frame_indexes": [noisy],
    }
    positions = [of_text, of_video]
    if sound:
        of_sound, _ = get_3d_mrope_ids_vae_tokens(sound, 1, 1, temporal_compression_factor=1, **grid)
        places = torch.arange(text_len + image_len, text_len + image_len + sound)
        positions.append(of_sound)
        call |= {
            "sound_tokens": [noise(generator, 6, sound, dtype=dtype)],
            "sound_token_shapes": [(sound, 1, 1)],
            "sound_sequence_indexes": places,
            "sound_mse_loss_indexes": places,
            "sound_timesteps": torch.full((sound,), 400.0),
            "sound_noisy_frame_indexes": [torch.arange(sound)],
        }
    call["position_ids"] = torch.cat([each.float() for each in positions], dim=1)
    call["sequence_length"] = call["position_ids"].shape[1]
    return call
