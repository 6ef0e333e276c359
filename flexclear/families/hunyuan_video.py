"""HunyuanVideo and HunyuanVideo 1.5: the video first, then the text, with its padding last."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.latents import LatentsFamily
from flexclear.runtime.checks import required_mask, required_tensor
from flexclear.runtime.facts import JOINT, Call
from flexclear.runtime.grid import GridReader

TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"


def _keep(text_len: int, lengths: Tensor) -> Tensor:
    """Marks the first ``lengths`` (``[B]``) text tokens of each sample, bool ``[B, text_len]``."""
    return torch.arange(text_len, device=lengths.device) < lengths[:, None]


@dataclass(frozen=True)
class HunyuanVideoFamily(LatentsFamily):
    """``HunyuanVideoTransformer3DModel``. Its text refiner attends over text alone, and is unchanged.

    For image to video, the first frame of tokens is the image's, without noise and with its own timestep (``token_replace``), or
    the image's latents are additional channels (``latent_concat``). Either way there is one grid, with tokens in raster order.
    """

    def read(self, model: Any, kwargs: dict[str, Any], grids: GridReader) -> Call:
        call = super().read(model, kwargs, grids)
        mask = required_mask(kwargs, MASK, TEXT, model)
        if grids.all_true(mask):
            return call
        # The model counts the tokens that the mask keeps, and takes this many from the beginning.
        return replace(call, keep={JOINT: _keep(mask.shape[1], mask.sum(1, dtype=torch.int))})

    def why_not_parallel(self, model: nn.Module) -> str | None:
        config: Any = model.config
        if config.image_condition_type == "token_replace":
            return "it tells the tokens of the first frame, which have a time of their own, by their place"
        return super().why_not_parallel(model)


@dataclass(frozen=True)
class HunyuanVideo15Family(LatentsFamily):
    """``HunyuanVideo15Transformer3DModel``.

    In each sample it joins an encoded image, quoted words and the prompt: first the unpadded tokens of each, then their padding.
    If the image is all zeros in the whole batch, there is none.
    """

    def read(self, model: Any, kwargs: dict[str, Any], grids: GridReader) -> Call:
        call = super().read(model, kwargs, grids)
        masks = [required_mask(kwargs, MASK + number, TEXT + number, model) for number in ("", "_2")]
        image = required_tensor(kwargs, "image_embeds", model)
        text_len = image.shape[1] + sum(mask.shape[1] for mask in masks)
        call = replace(call, text_lens={JOINT: text_len})
        seen = 0 if grids.once(image, _all_zeros) else image.shape[1]
        if seen and all(grids.all_true(mask) for mask in masks):
            return call
        words, glyphs = (mask.bool().sum(1) for mask in masks)
        return replace(call, keep={JOINT: _keep(text_len, seen + words + glyphs)})


def _all_zeros(image: Tensor) -> bool:
    return not bool(image.any())


HUNYUAN_VIDEO = HunyuanVideoFamily(
    model_class="HunyuanVideoTransformer3DModel",
    processors=("HunyuanVideoAttnProcessor2_0",),
    stacks={"transformer_blocks": "attn", "single_transformer_blocks": "attn"},
    carriers=("rope",),
    text_first=False,
    given={"attention_mask": None},
    video=True,
    rows=0,
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    notes="text and image to video, by a given first frame or by additional channels; padded text is masked",
)

HUNYUAN_VIDEO15 = HunyuanVideo15Family(
    model_class="HunyuanVideo15Transformer3DModel",
    processors=("HunyuanVideo15AttnProcessor2_0",),
    stacks={"transformer_blocks": "attn"},
    carriers=("rope",),
    text_first=False,
    given={"attention_mask": None},
    unbuilt=("attention_mask", "self_attn_mask_1", "self_attn_mask_2"),
    video=True,
    rows=0,
    px_per_token=16,
    latents_per_token=1,
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    notes=(
        "text and image to video; padded text is masked, without the mask over all pairs of tokens that diffusers builds in "
        "every layer"
    ),
)
