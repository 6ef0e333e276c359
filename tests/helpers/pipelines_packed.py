"""Complete diffusers pipelines of the models in ``models_packed``, with small random text encoders, tokenizers and VAEs.

All parts are of the published pipeline's classes, with one exception, and nothing is downloaded. transformers' processors of
Qwen-VL models need torchvision for videos; ColQwen2's, with the same image processor and tokenizer, does not.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from PIL import Image

from . import models_packed as models

PROMPT = "a red apple on a blue background"
OTHER = "a yellow sunflower and a green leaf in front of a white wall"
PROMPTS = [PROMPT, OTHER]
"""Two prompts of different lengths."""

EDIT = json.dumps({"edit_instruction": PROMPT})
"""A prompt in FIBO Edit's format."""

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = (
    *PROMPTS,
    "system user assistant edit_instruction",
    # the text that pipelines put around a prompt, so that it takes as many tokens as with the published vocabulary
    "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the objects "
    "and background:",
)


@functools.cache
def qwen_tokenizer():
    """A Qwen2Tokenizer with a token for each word of the prompts and templates, and for each byte."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    learned.train_from_iterator([*_WORDS, *(word for words in _WORDS for word in words.split())], trainer)
    found = json.loads(learned.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=found["vocab"],
        merges=[tuple(pair) for pair in found["merges"]],
        additional_special_tokens=list(_SPECIAL[1:]),
        chat_template=_TEMPLATE,
    )


@functools.cache
def t5_tokenizer():
    """A T5 tokenizer of the prompts' words."""
    from transformers import T5TokenizerFast

    words = sorted({word for words in _WORDS for word in words.split()})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0), *(("▁" + word, -1.0) for word in words)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0)


@functools.cache
def vision_processor():
    """Qwen2-VL's image processor for small images, and the tokenizer."""
    from transformers import ColQwen2Processor, Qwen2VLImageProcessor

    images = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    return ColQwen2Processor(images, qwen_tokenizer(), chat_template=_TEMPLATE)


def _text_sizes(width: int, layers: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": len(qwen_tokenizer()),
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }


@functools.cache
def qwen3(width: int = 12):
    """A Qwen3Model."""
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    return Qwen3Model(Qwen3Config(head_dim=8, **_text_sizes(width))).eval()


def _tokens(*names: str) -> dict[str, int]:
    return {f"{name}_token_id": qwen_tokenizer().convert_tokens_to_ids(f"<|{name}|>") for name in names}


@functools.cache
def qwen25_vl(width: int = 12):
    """A Qwen2_5_VLForConditionalGeneration."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0}
    text = {**_text_sizes(width), "rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 0}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": width}
    ids = _tokens("vision_start", "vision_end")
    image, video = (qwen_tokenizer().convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video"))
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=image, video_token_id=video, **ids)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@functools.cache
def qwen3_vl(kind: str, width: int = 12):
    """A Qwen3VLModel or Qwen3VLForConditionalGeneration."""
    import transformers

    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = {**_text_sizes(width), "head_dim": 8, "rope_parameters": rope}
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": width,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    return getattr(transformers, kind)(config).eval()


@functools.cache
def smollm3(width: int = 6):
    """A SmolLM3ForCausalLM with as many embeddings as FIBO's pipeline needs: an empty prompt is token 128000."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    torch.manual_seed(0)
    sizes = {**_text_sizes(width), "vocab_size": 128001, "num_attention_heads": 1}
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return SmolLM3ForCausalLM(SmolLM3Config(**sizes, **ends)).eval()


@functools.cache
def t5(width: int = 12):
    """A T5EncoderModel."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": width, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), **sizes)).eval()


@functools.cache
def kl_vae(latents: int):
    """An AutoencoderKL with one latent per 2 x 2 px."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=latents,
        norm_num_groups=2,
        shift_factor=0.1,
        scaling_factor=0.4,
        mid_block_add_attention=False,
    ).eval()


@functools.cache
def qwen_vae(latents: int = 2):
    """An AutoencoderKLQwenImage with one latent per 2 x 2 px."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(1)
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=latents,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * latents,
        latents_std=[1.0] * latents,
    ).eval()


@functools.cache
def wan_vae(latents: int = 8):
    """An AutoencoderKLWan with one latent per 16 x 16 px, on which FIBO's pipeline relies."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=latents,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * latents,
        latents_std=[1.0] * latents,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()


@functools.cache
def flux2_vae(latents: int = 2):
    """An AutoencoderKLFlux2 with one latent per 2 x 2 px."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(1)
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=latents,
        norm_num_groups=2,
        layers_per_block=1,
        mid_block_add_attention=False,
    ).eval()


def _scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _pipeline(kind: str, **parts: Any):
    import diffusers

    pipe = getattr(diffusers, kind)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def longcat(kind: str = "LongCatImagePipeline", transformer: Any = None):
    """LongCat-Image or LongCat-Image-Edit, with prompts of 12 tokens instead of 512; a token covers 4 x 4 px."""
    pipe = _pipeline(
        kind,
        scheduler=_scheduler(),
        vae=kl_vae(16),
        text_encoder=qwen25_vl(),
        tokenizer=qwen_tokenizer(),
        text_processor=vision_processor(),
        transformer=transformer or models.tiny_longcat(in_channels=64),
    )
    pipe.tokenizer_max_length = 12
    return pipe


def ovis(transformer: Any = None):
    """Ovis-Image; a token covers 4 x 4 px."""
    return _pipeline(
        "OvisImagePipeline",
        scheduler=_scheduler(),
        vae=kl_vae(2),
        text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer or models.tiny_ovis(),
    )


def bria(transformer: Any = None):
    """Bria 3.2; a token covers 4 x 4 px."""
    return _pipeline(
        "BriaPipeline",
        scheduler=_scheduler(),
        vae=kl_vae(2),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=transformer or models.tiny_bria(),
    )


def fibo(kind: str = "BriaFiboPipeline", transformer: Any = None):
    """Bria FIBO or FIBO Edit; a token covers 16 x 16 px."""
    return _pipeline(
        kind,
        scheduler=_scheduler(),
        vae=wan_vae(),
        text_encoder=smollm3(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer or models.tiny_fibo(),
    )


def krea2(transformer: Any = None):
    """Krea 2; a token covers 4 x 4 px."""
    return _pipeline(
        "Krea2Pipeline",
        scheduler=_scheduler(),
        vae=qwen_vae(),
        text_encoder=qwen3_vl("Qwen3VLModel"),
        tokenizer=qwen_tokenizer(),
        transformer=transformer or models.tiny_krea2(),
        text_encoder_select_layers=(0, 1, 2),
    )


def flux3(kind: str = "Flux3AutoBlocks", transformer: Any = None):
    """FLUX.3's modular pipeline without its prompt upsampler, or the distilled one; a token covers 4 x 4 px."""
    import diffusers
    from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor

    blocks = getattr(diffusers, kind)()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipe = blocks.init_pipeline()
    distilled = "Distilled" in kind
    pipe.update_components(
        vae=flux2_vae(),
        text_encoder=qwen3_vl("Qwen3VLForConditionalGeneration"),
        tokenizer=vision_processor(),
        image_processor=Flux3ImageProcessor(vae_scale_factor=4, vae_latent_channels=2),
        transformer=transformer or models.tiny_flux3(joint_attention_dim=24, flow_map=distilled),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, height: int, width: int, batch: int = 2, seed: int = 3, **options: Any) -> torch.Tensor:
    """Images as a tensor ``[batch, 3, height, width]`` after two steps, each with its own prompt if several are allowed."""
    shared = {
        "height": height,
        "width": width,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt",
    }
    own = _OPTIONS[type(pipe).__name__](batch)
    given = {**shared, **own, **options}
    if type(pipe).__name__ == "LongCatImageEditPipeline":  # as large as the image that it is given
        del given["height"], given["width"]
    found = pipe(**given)
    return found if isinstance(found, torch.Tensor) else found.images


def _several(batch: int, **more: Any) -> dict[str, Any]:
    return {"prompt": [PROMPTS[number % 2] for number in range(batch)], **more}


def _one(batch: int, **more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "num_images_per_prompt": batch, **more}


_OPTIONS = {
    # A negative prompt that is one string, as by default, makes a batch of one, which does not fit several prompts.
    "LongCatImagePipeline": lambda batch: _several(batch, negative_prompt=[""] * batch, enable_prompt_rewrite=False),
    "LongCatImageEditPipeline": _one,
    "OvisImagePipeline": lambda batch: _several(batch, max_sequence_length=16),
    "BriaPipeline": lambda batch: _several(batch, max_sequence_length=16),
    "BriaFiboPipeline": _several,
    "BriaFiboEditPipeline": lambda batch: _one(batch, prompt=EDIT),
    "Krea2Pipeline": lambda batch: _several(batch, max_sequence_length=24),
    "Flux3ModularPipeline": lambda batch: _one(batch, text_encoder_out_layers=(1, 2), output="images"),
    "Flux3DistilledModularPipeline": lambda batch: _one(batch, text_encoder_out_layers=(1, 2), output="images"),
}


def image(height: int, width: int, number: int = 0) -> Image.Image:
    """One of several images for editing or reference."""
    drawn = Image.linear_gradient("L").rotate(90 * number) if number else Image.radial_gradient("L")
    return drawn.resize((width, height)).convert("RGB")
