"""FLUX.1 and SD3.5 pipelines of small parts with random weights, 8 px per token, and the embedded model's tokenizers."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import flexclear

from helpers.models import tiny_flux

VAE = {
    "latent_channels": 16,
    "block_out_channels": (8, 8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "shift_factor": 0.1,
    "scaling_factor": 1.5,
    "mid_block_add_attention": False,
    "sample_size": 64,
}


@pytest.fixture(scope="session")
def embedded():
    pipe = flexclear.embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(tokenizer, kind, width):
    from transformers import CLIPTextConfig

    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, projection_dim=width, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2, bos_token_id=832, eos_token_id=833,
        )
    ).eval()  # fmt: skip


def t5(tokenizer):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE).eval()


@pytest.fixture(scope="session")
def flux_parts(embedded):
    """A FluxPipeline with a guidance input, as FLUX.1-dev has."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    pipe = FluxPipeline(
        transformer=tiny_flux(in_channels=64, joint_attention_dim=48, pooled_projection_dim=16, guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=clip(embedded.tokenizer, CLIPTextModel, 16),
        tokenizer=embedded.tokenizer,
        text_encoder_2=t5(embedded.tokenizer_2),
        tokenizer_2=embedded.tokenizer_2,
    )
    pipe.default_sample_size = 16
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def sd3_parts(embedded):
    """A StableDiffusion3Pipeline with SD3.5 medium's image-only attention and its positions up to 24 x 24 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=40,
        pos_embed_max_size=24, qk_norm="rms_norm", dual_attention_layers=(0, 1),
    ).eval()  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip(embedded.tokenizer, CLIPTextModelWithProjection, 16),
        tokenizer=embedded.tokenizer,
        text_encoder_2=clip(embedded.tokenizer, CLIPTextModelWithProjection, 24),
        tokenizer_2=embedded.tokenizer,
        text_encoder_3=t5(embedded.tokenizer_2),
        tokenizer_3=embedded.tokenizer_2,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def flux(flux_parts):
    yield flux_parts
    flexclear.restore(flux_parts)


@pytest.fixture
def sd3(sd3_parts):
    yield sd3_parts
    flexclear.restore(sd3_parts)


@pytest.fixture(params=["flux", "sd3"])
def pipe(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def photo():
    """An image of 64 x 48 pixels (width x height)."""
    return Image.merge(
        "RGB", [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.radial_gradient("L")]
    ).resize((64, 48))
