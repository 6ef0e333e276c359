"""Small parts of the pipelines of video models, made here, and a saved video read back."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch
from PIL import Image

from .models_latents import settle
from .pipeline_parts import byte_tokenizer, t5

SIZE = {"height": 48, "width": 64, "num_frames": 9}
"""Size of a video with latents of 3 x 6 x 8: for Wan's VAE a latent covers 8 x 8 pixels and, after the first frame, 4 frames."""

TEXT = 16
"""Channels of the text encoder."""


def wan_vae(channels: int = 4, **config):
    """An AutoencoderKLWan; a latent covers 8 x 8 pixels and 4 frames."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(4)
    sizes = {
        "base_dim": 3,
        "z_dim": channels,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.1] * channels,
        "latents_std": [1.5] * channels,
    }
    return settle(AutoencoderKLWan(**{**sizes, **config}), 4)


def wan_parts(transformer, vae=None, **more):
    """The parts of a Wan pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {
        "tokenizer": byte_tokenizer(starts=False),
        "text_encoder": t5("UMT5EncoderModel", width=TEXT),
        "vae": wan_vae() if vae is None else vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": transformer,
        **more,
    }


def image_parts(width: int):
    """The image encoder of a Wan 2.1 pipeline, ``width`` channels wide, and its processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=37,
        patch_size=16,
    )
    processor = CLIPImageProcessor(crop_size={"height": 32, "width": 32}, size={"shortest_edge": 32})
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": processor}


def picture(seed: int = 0, height: int = 48, width: int = 64) -> Image.Image:
    """A colourful picture."""
    generator = torch.Generator().manual_seed(seed)
    small = (torch.rand(4, 6, 3, generator=generator) * 255).to(torch.uint8)
    return Image.fromarray(small.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def clip(frames: int = 9) -> list[Image.Image]:
    """A video of ``frames`` frames, each a different picture."""
    return [picture(seed) for seed in range(frames)]


def without_ftfy(monkeypatch, pipeline: type) -> None:
    """Let pipelines clean prompts without ftfy, which repairs broken characters: there are none here."""
    module = importlib.import_module(pipeline.__module__)
    if not hasattr(module, "ftfy"):
        monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)


def saved(frames, path) -> list[Image.Image]:
    """Save a video ``[F, C, H, W]``, 0 to 1, as an animated GIF, and return the frames in the file."""
    from diffusers.utils import export_to_gif

    pictures = [Image.fromarray((each.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()) for each in frames]
    with Image.open(export_to_gif(pictures, str(path))) as file:
        found = []
        for number in range(file.n_frames):
            file.seek(number)
            found.append(file.convert("RGB"))
        return found
