"""Build the untrained text encoders, transformer and scheduler."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from flexclear.embedded.train.tokenizers import CLIP_LENGTH

TEXT_WIDTH = 96


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a one-layer CLIP text model, 96 wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.0,
    )
    return CLIPTextModel(config)


def build_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Return a one-layer T5 encoder, 96 wide."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 4,
        d_ff=2 * TEXT_WIDTH,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5EncoderModel(config)


def build_transformer() -> FluxTransformer2DModel:
    """Return a FLUX transformer of 2.3 M parameters that starts by predicting zero."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    modulations = [model.norm_out.linear, model.proj_out]
    for block in model.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for block in model.single_transformer_blocks:
        modulations.append(block.norm.linear)
    for layer in modulations:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler of FLUX.1-dev: Euler steps, shifted by the number of image tokens."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
