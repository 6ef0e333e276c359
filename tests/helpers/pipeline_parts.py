"""Small parts of real pipelines, made here: tokenizers, autoencoders, text encoders from transformers, LoRAs."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn

PROMPTS = ("a red apple on a blue background", "three sunflowers")
"""Two samples whose texts are of different lengths."""


def byte_tokenizer(*special: str, starts: bool = True, **options):
    """A fast tokenizer of transformers whose tokens are bytes and special tokens: padding is 0, the end 1, the start 2.

    Args:
        special: additional special tokens.
        starts: whether the start token is put in front of a text.
        options: options of the tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", "<start>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    if starts:
        made.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 2)])
    made.add_special_tokens(words[: 3 + len(special)])
    names = {"pad_token": "<pad>", "eos_token": "<end>", "bos_token": "<start>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, **options)


LANGUAGE = {
    "vocab_size": 288,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
"""Configuration of a language model of 2 layers and 16 channels."""


@functools.cache
def t5(kind: str = "T5EncoderModel", width: int = 16, words: int = 384):
    """A T5-like text encoder of transformers, by default with as many words as ByT5."""
    import transformers

    torch.manual_seed(3)
    config = {"vocab_size": words, "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config_class = transformers.UMT5Config if kind.startswith("UMT5") else transformers.T5Config
    return getattr(transformers, kind)(config_class(**config)).eval()


def image_vae(levels: int = 2, channels: int = 4, kind: str = "AutoencoderKL", **config):
    """An autoencoder of diffusers; a latent covers 2 ** (levels - 1) pixels each way."""
    import diffusers

    torch.manual_seed(4)
    sizes = {
        "latent_channels": channels,
        "block_out_channels": (8,) * levels,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "mid_block_add_attention": False,
    }
    return getattr(diffusers, kind)(**{**sizes, **config}).eval()


KL = {"shift_factor": 0.1, "scaling_factor": 1.5}
"""Configuration for the autoencoder of a pipeline that reads these factors."""


def quiet(pipe):
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, *, prompt=PROMPTS, seed: int = 2, **options) -> torch.Tensor:
    """The images of two steps, ``[B, 3, H, W]`` from 0 to 1, or the videos, ``[B, F, 3, H, W]``."""
    if prompt is not None:
        options["prompt"] = list(prompt) if isinstance(prompt, tuple) else prompt
    torch.manual_seed(seed)  # for what a pipeline samples without the generator
    output = pipe(
        **{"num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed), "output_type": "pt", **options}
    )
    images = output.images if hasattr(output, "images") else output.frames
    assert images.isfinite().all()
    return images


def lora(model: nn.Module, projections: Iterable[str] = ("to_q", "to_k"), prefix: str = "transformer.", rank: int = 2):
    """A LoRA's state dict for the projections with these names, in the format that diffusers saves."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in projections:
            state[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator)
            state[f"{prefix}{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator)
    assert state, f"no {projections} in {type(model).__name__}"
    return state


def check_pipeline(
    pipe, size: tuple[int, int], *, prompts=PROMPTS, guided: dict | None = None, **options
) -> torch.Tensor:
    """The images of a rectangular call with two prompts. Asserts that each prompt matters, and guidance, if there is any.

    Args:
        size: (height, width) in pixels.
        prompts: the two prompts.
        guided: arguments that turn guidance on.
        options: other arguments of the call.
    """
    height, width = size
    options = {"height": height, "width": width, **options}
    images = draw(pipe, prompt=prompts, **options)
    assert (images.shape[0], *images.shape[2:]) == (2, height, width)
    swapped = draw(pipe, prompt=prompts[::-1], **options)
    assert (images - swapped).flatten(1).abs().amax(1).min() > 1e-4, "a prompt makes no difference"
    if guided:
        with_guidance = draw(pipe, prompt=prompts, **{**options, **guided})
        assert (images - with_guidance).flatten(1).abs().amax(1).min() > 1e-4, "guidance makes no difference"
        images = with_guidance
    return images


def check_lora(pipe, load, unload, **options) -> None:
    """Assert that a LoRA changes the images, and has no effect once it is unloaded."""
    plain = draw(pipe, **options)
    load()
    changed = draw(pipe, **options)
    assert (changed - plain).abs().max() > 1e-3, "the LoRA makes no difference"
    unload()
    assert torch.equal(draw(pipe, **options), plain)
