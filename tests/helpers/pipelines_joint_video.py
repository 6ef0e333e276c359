"""Complete diffusers pipelines of the models in ``models_joint_video``, with small random text encoders, tokenizers and VAEs.

All parts are of the published pipeline's classes; nothing is downloaded. Tokenizers work on bytes.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from . import models_joint_video as models
from .pipeline_parts import LANGUAGE, PROMPTS, byte_tokenizer, quiet, t5


def picture(height: int = 64, width: int = 96) -> Image.Image:
    """An image to begin with."""
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def draw(pipe: Any, *, prompt: Any = PROMPTS, seed: int = 2, decode: bool = True, **options: Any) -> torch.Tensor:
    """The videos of two steps, ``[B, frames, 3, H, W]`` from 0 to 1, or their latents."""
    torch.manual_seed(seed)  # for what a pipeline samples without the generator
    shared: dict[str, Any] = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed)}
    if type(pipe).__name__ == "MiniMaxH3ModularPipeline":
        pipe = pipe if decode else without_decoder(pipe)
        shared["output"] = "videos" if decode else "latents"
        shared |= {"output_type": "pt"} if decode else {}
    else:
        shared["output_type"] = "pt" if decode else "latent"
    found = pipe(prompt=list(prompt) if isinstance(prompt, tuple) else prompt, **{**shared, **options})
    if not isinstance(found, torch.Tensor):
        found = found.video[None] if "video" in found else found.frames
    frames = found
    assert frames.isfinite().all()
    return frames


def without_decoder(pipe: Any) -> Any:
    """The same modular pipeline, with the same parts, but only up to the latents."""
    from diffusers import MiniMaxH3Blocks

    blocks = MiniMaxH3Blocks()
    blocks.sub_blocks.pop("decode")
    made = blocks.init_pipeline()
    own = {spec.name for spec in blocks.expected_components}
    made.update_components(**{name: part for name, part in pipe.components.items() if name in own and part is not None})
    return quiet(made)


MILLISECONDS = 120
"""Duration of a frame of a saved video."""


def save_gif(frames: torch.Tensor, path: Path) -> None:
    """Save one video ``[frames, 3, H, W]`` as an animated GIF, in which equal frames become one longer frame."""
    pictures = [Image.fromarray(each) for each in (255 * frames).byte().permute(0, 2, 3, 1).numpy().astype(np.uint8)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=MILLISECONDS, loop=0)


def flow_scheduler(shift: float = 7.0):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift)


def clip_text():
    """A CLIPTextModel of 77 positions, 10 channels."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    sizes = {"hidden_size": 10, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=288, eos_token_id=1, **sizes)).eval()


def hunyuan_video_vae():
    """An AutoencoderKLHunyuanVideo with one latent per 4 x 8 x 8 pixels."""
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(4)
    return AutoencoderKLHunyuanVideo(
        latent_channels=models.CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def hunyuan_video(**config: Any):
    """HunyuanVideo with empty templates; a token covers 16 x 16 px and four frames."""
    from diffusers import HunyuanVideoPipeline
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(3)
    return quiet(
        HunyuanVideoPipeline(
            text_encoder=LlamaModel(LlamaConfig(**LANGUAGE)).eval(),
            tokenizer=byte_tokenizer(),
            transformer=models.tiny_hunyuan_video(text_embed_dim=16, **config),
            vae=hunyuan_video_vae(),
            scheduler=flow_scheduler(),
            text_encoder_2=clip_text(),
            tokenizer_2=byte_tokenizer(),
        )
    )


HUNYUAN_VIDEO = {
    "prompt_template": {"template": "{}", "crop_start": 0},
    "max_sequence_length": 40,
    "height": 80,
    "width": 112,
    "num_frames": 9,
}
"""Options of a call: 3 x 5 x 7 tokens."""


def hunyuan_video_from_image(kind: str):
    """HunyuanVideo's image to video, with the condition type ``"token_replace"`` or ``"latent_concat"``."""
    from diffusers import HunyuanVideoImageToVideoPipeline
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(3)
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**LANGUAGE),
            vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **vision),
            image_token_index=3,
            pad_token_id=0,
        )
    ).eval()
    channels = 2 * models.CHANNELS + 1 if kind == "latent_concat" else models.CHANNELS
    return quiet(
        HunyuanVideoImageToVideoPipeline(
            text_encoder=encoder,
            tokenizer=byte_tokenizer("<image>", "<|end_header_id|>"),
            transformer=models.tiny_hunyuan_video(text_embed_dim=16, image_condition_type=kind, in_channels=channels),
            vae=hunyuan_video_vae(),
            scheduler=flow_scheduler(),
            text_encoder_2=clip_text(),
            tokenizer_2=byte_tokenizer(),
            image_processor=CLIPImageProcessor(size=28, crop_size=28),
        )
    )


HUNYUAN_VIDEO_FROM_IMAGE = {
    **HUNYUAN_VIDEO,
    "prompt_template": {
        "template": "<image>S<|end_header_id|>U<|end_header_id|>{}AAA<|end_header_id|>",
        "crop_start": 6,
        "image_emb_start": 1,
        "image_emb_end": 5,
        "image_emb_len": 4,
    },
}
"""The same with one prompt and one image, whose four tokens count as text."""


def hunyuan_video15(image: bool = False):
    """HunyuanVideo 1.5, text or image to video, with short templates; a token covers 8 x 8 px and two frames."""
    import diffusers
    from transformers import (
        ByT5Tokenizer,
        Qwen2_5_VLTextConfig,
        Qwen2_5_VLTextModel,
        SiglipImageProcessor,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    torch.manual_seed(3)
    sizes = {name: LANGUAGE[name] for name in LANGUAGE if name != "head_dim"}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    encoder = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(**{**sizes, "num_hidden_layers": 3}, rope_parameters=rope)
    ).eval()
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=models.CHANNELS,
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    ).eval()
    vae.enable_slicing()  # its attention cannot make a mask for two samples
    parts: dict[str, Any] = {
        "text_encoder": encoder,
        "tokenizer": byte_tokenizer(chat_template="{{ messages[-1]['content'] }}"),
        "transformer": models.tiny_hunyuan_video15(
            text_embed_dim=16, text_embed_2_dim=16, task_type="i2v" if image else "t2v", target_size=64
        ),
        "vae": vae,
        "scheduler": flow_scheduler(),
        "text_encoder_2": t5(),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    }
    if image:
        vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        parts["image_encoder"] = SiglipVisionModel(SiglipVisionConfig(image_size=28, patch_size=14, **vision)).eval()
        parts["feature_extractor"] = SiglipImageProcessor(size={"height": 28, "width": 28})
    kind = diffusers.HunyuanVideo15ImageToVideoPipeline if image else diffusers.HunyuanVideo15Pipeline
    pipe = quiet(kind(**parts))
    pipe.system_message = ""
    pipe.prompt_template_encode_start_idx = 1
    pipe.tokenizer_max_length = 40
    pipe.tokenizer_2_max_length = 24
    pipe.vision_num_semantic_tokens = 4
    return pipe


HUNYUAN_VIDEO15 = {"height": 40, "width": 56, "num_frames": 9, "negative_prompt": ["grey", "green"]}
"""Options of a call: 3 x 5 x 7 tokens."""


def cogvideox(image: bool = False, **config: Any):
    """CogVideoX, text or image to video; a token covers 16 x 16 px and four frames."""
    import diffusers

    torch.manual_seed(4)
    vae = diffusers.AutoencoderKLCogVideoX(
        latent_channels=models.CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=96,
        sample_width=128,
    ).eval()
    channels = {"in_channels": 2 * models.CHANNELS} if image else {}
    kind = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    return quiet(
        kind(
            tokenizer=byte_tokenizer(starts=False),
            text_encoder=t5(),
            vae=vae,
            transformer=models.tiny_cogvideox(text_embed_dim=16, max_text_seq_length=40, **channels, **config),
            scheduler=diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0, prediction_type="v_prediction"),
        )
    )


COGVIDEOX = {"height": 80, "width": 112, "num_frames": 9, "max_sequence_length": 40}
"""Options of a call: 3 x 5 x 7 tokens."""


def mochi():
    """Mochi; a token covers 16 x 16 px and six frames."""
    import diffusers

    torch.manual_seed(4)
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    return quiet(
        diffusers.MochiPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=t5(),
            tokenizer=byte_tokenizer(starts=False),
            transformer=models.tiny_mochi(in_channels=12),  # the pipeline relies on 12
        )
    )


MOCHI = {"height": 80, "width": 112, "num_frames": 13, "max_sequence_length": 40}
"""Options of a call: 3 x 5 x 7 tokens."""


def minimax_h3(reference: bool = False):
    """MiniMax-H3's modular pipeline; a token covers 32 x 32 px and four frames, except for the first of every five.

    Args:
        reference: whether it also has the second transformer, which runs calls with references.
    """
    from diffusers import (
        AutoencoderKLMiniMaxH3,
        AutoencoderKLMiniMaxH3Audio,
        MiniMaxH3Blocks,
        MiniMaxH3Scheduler,
    )
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from .pipelines_packed import qwen_tokenizer, vision_processor

    torch.manual_seed(3)
    text = {
        "vocab_size": len(qwen_tokenizer()),
        "hidden_size": models.TEXT,
        "intermediate_size": 16,
        "num_hidden_layers": 51,  # the pipeline takes the output of the 50th
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    }
    vision = {
        "depth": 1,
        "patch_size": 14,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": models.TEXT,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    image = qwen_tokenizer().convert_tokens_to_ids("<|image_pad|>")
    encoder = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=image)
    ).eval()
    vae = AutoencoderKLMiniMaxH3(
        latent_channels=models.CHANNELS,
        block_out_channels=(8, 8, 8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        decoder_attention_head_dim=16,
        latents_mean=(0.0,) * models.CHANNELS,
        latents_std=(1.0,) * models.CHANNELS,
    ).eval()
    audio = AutoencoderKLMiniMaxH3Audio(
        encoder_dim=2,
        latent_dim=48,
        latent_channels=6,
        num_attention_heads=2,
        decoder_dim=128,
        latents_mean=[0.0] * 6,
        latents_std=[1.0] * 6,
    ).eval()
    pipe = MiniMaxH3Blocks().init_pipeline()
    pipe.update_components(
        text_encoder=encoder,
        tokenizer=qwen_tokenizer(),
        processor=vision_processor(),
        transformer=models.tiny_minimax_h3(),
        vae=vae,
        audio_vae=audio,
        scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    )
    if reference:
        pipe.update_components(transformer_ref=models.tiny_minimax_h3(1))
    return quiet(pipe)


def minimax_h3_references() -> list[Any]:
    """References for a call of MiniMax-H3."""
    from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3ImageReference

    return [MiniMaxH3ImageReference(image=picture(96, 128))]


MINIMAX_H3 = {"height": 96, "width": 128, "num_frames": 124, "num_inference_steps": 3}
"""Options of a call: 37 x 3 x 4 tokens, the shortest clip that the pipeline makes; its last step does not run the model."""


def cosmos3(sound_tokenizer: Any = None, **config: Any):
    """Cosmos 3 without its safety checker; a token covers 32 x 32 px and four frames."""
    from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler

    from .pipelines_packed import wan_vae

    return quiet(
        Cosmos3OmniPipeline(
            transformer=models.tiny_cosmos3(latent_channel=8, patch_latent_dim=32, **config),
            text_tokenizer=byte_tokenizer(
                "<|vision_start|>", starts=False, chat_template="{{ messages[-1]['content'] }}"
            ),
            vae=wan_vae(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000
            ),
            sound_tokenizer=sound_tokenizer,
            enable_safety_checker=False,
        )
    )


def cosmos3_with_sound():
    """Cosmos 3 that makes sound, a latent of it for each 80 samples."""
    from diffusers import Cosmos3AVAEAudioTokenizer

    torch.manual_seed(4)
    decoder = Cosmos3AVAEAudioTokenizer(
        sampling_rate=48000,
        vocoder_input_dim=6,
        dec_dim=4,
        dec_c_mults=(1, 2),
        dec_strides=(40, 60),
        encoder_enabled=False,
    )
    return cosmos3(sound_tokenizer=decoder.eval(), sound_gen=True, sound_dim=6, sound_latent_fps=20.0)


def draw_with_sound(pipe: Any, decode: bool = True, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A video's latents, and its sound ``[channels, samples]`` or the latents of that, of two steps of Cosmos 3."""
    generator = torch.Generator().manual_seed(2)
    call = {**COSMOS3, "num_inference_steps": 2, "output_type": "latent", "enable_sound": True, **options}
    with contextlib.ExitStack() as stack:
        if not decode:
            stack.enter_context(mock.patch.object(pipe, "decode_sound", lambda latent: latent))
        found = pipe(generator=generator, **call)
    return found.video, found.sound


COSMOS3 = {"height": 96, "width": 160, "num_frames": 9, "use_system_prompt": False, "add_resolution_template": False}
"""Options of a call: 3 x 3 x 5 tokens."""
