"""Rows of the models that take latents, and make tokens of them themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from .pieces import (
    FLUX_BLOCK,
    FLUX_STACKS,
    FORMULAS,
    MASK_HELD,
    NO_ADAPTER,
    NO_FUSING,
    POOLED,
    fuse,
    keep,
    mask_among,
    share,
)
from .row import Refused, Row
from .shapes import Shape
from helpers import models_latents as models

LACKS = {
    "references": "the model takes one image",
    "residuals": "the model takes no residuals",
    "ids": "positions come from sizes",
    "ip-adapter": NO_ADAPTER,
    "fuse": NO_FUSING,
}


def shaped(make: Callable[..., dict[str, Any]]) -> Callable[[Shape], dict[str, Any]]:
    """A call of a shape, by a function of its sizes."""
    return lambda shape: make(shape.height, shape.width, shape.text_len, shape.batch, shape.seed)


def stretch(path: str) -> Callable[[Any, float], None]:
    """Multiplies the base of the frequencies of the module at ``path``."""

    def multiply(model, factor: float) -> None:
        model.get_submodule(path).theta *= factor

    return multiply


REFUSES = {
    "pooled keys": POOLED,
    "formulas": FORMULAS,
    "ranks": Refused("cannot be shared by several ranks: the model makes its tokens itself", afterwards=share),
}


def text_mask(shape: Shape) -> dict[str, Any]:
    return {"attention_mask": torch.ones(shape.batch, shape.text_len)}


AURAFLOW = Row(
    "auraflow",
    "AuraFlow",
    models.tiny_auraflow,
    shaped(models.auraflow_call),
    text_first=True,
    head_64=models.AURAFLOW_64,
    one_block={"num_mmdit_layers": 1, "num_single_dit_layers": 1},
    joint_block={"num_mmdit_layers": 1, "num_single_dit_layers": 0},
    no_block={"num_mmdit_layers": 0, "num_single_dit_layers": 0},
    graphs=2,
    stacks={"joint_transformer_blocks": "attn", "single_transformer_blocks": "attn"},
    text_lens=lambda shape: (shape.text_len + models.AURAFLOW_REGISTERS,),
    fuse=fuse,
    fusing_replaces=True,
    refuses={
        **REFUSES,
        "padding": Refused(MASK_HELD, call=mask_among("attention_kwargs")),
        "ntk": Refused("has no rotary positions", {"ntk_factor": 10.0}),
    },
    brief=True,
    lacks={**{name: why for name, why in LACKS.items() if name != "fuse"}, "ids": "positions are added to the tokens"},
)

COGVIEW4 = Row(
    "cogview4",
    "CogView4",
    models.tiny_cogview4,
    shaped(models.cogview4_call),
    text_first=True,
    head_64=models.COGVIEW4_64,
    one_block={"num_layers": 1},
    joint_block={"num_layers": 1},
    no_block={"num_layers": 0},
    graphs=1,
    stacks={"transformer_blocks": "attn1"},
    stretch=stretch("rope"),
    refuses={**REFUSES, "padding": Refused("takes no attention_mask: diffusers adds it to the scores", call=text_mask)},
    lacks=LACKS,
    brief=True,
)


def hunyuan_image_call(shape: Shape) -> dict[str, Any]:
    call = shaped(models.hunyuan_image_call)(shape)
    return {**call, "encoder_attention_mask": keep(shape).to(torch.int64)}


HUNYUAN_IMAGE = Row(
    "hunyuan",
    "HunyuanImage 2.1",
    models.tiny_hunyuan_image,
    hunyuan_image_call,
    text_first=False,
    head_64=models.HUNYUAN_IMAGE_64,
    one_block=FLUX_BLOCK,
    joint_block={"num_layers": 1, "num_single_layers": 0},
    no_block={"num_layers": 0, "num_single_layers": 0},
    graphs=2,
    stacks=FLUX_STACKS,
    other_lens=lambda shape: (shape.text_len,),  # its refiner of the text
    paddings={"int": True},
    stretch=stretch("rope"),
    refuses=REFUSES,
    brief=True,
    lacks={
        **LACKS,
        "checkpointing": "diffusers 0.42.1 hands its blocks keywords that checkpointing does not take: the stock model raises",
    },
)


def caches(mode: str) -> Callable[[Shape], dict[str, Any]]:
    """Caches of a model of two blocks, as a pipeline gives them for condition images."""

    def make(shape: Shape) -> dict[str, Any]:
        from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

        given = GlmImageKVCache(num_layers=2)
        given.set_mode(mode)
        return {"kv_caches": given}

    return make


GLM_IMAGE = Row(
    "glm",
    "GLM-Image",
    models.tiny_glm_image,
    shaped(models.glm_image_call),
    text_first=True,
    head_64=models.GLM_IMAGE_64,
    one_block={"num_layers": 1},
    joint_block={"num_layers": 1},
    no_block={"num_layers": 0},
    graphs=1,
    stacks={"transformer_blocks": "attn1"},
    stretch=stretch("rope"),
    refuses={
        **REFUSES,
        "padding": Refused("takes no attention_mask: diffusers adds it to the scores", call=text_mask),
        "references": Refused("in mode 'read': the keys and values of condition images", call=caches("read")),
    },
    lacks={name: why for name, why in LACKS.items() if name != "references"},
    brief=True,
)


def ernie_image_call(shape: Shape) -> dict[str, Any]:
    return {**shaped(models.ernie_image_call)(shape), "text_lens": keep(shape).sum(1)}


ERNIE_IMAGE = Row(
    "ernie",
    "ERNIE-Image",
    models.tiny_ernie_image,
    ernie_image_call,
    text_first=False,
    head_64=models.ERNIE_IMAGE_64,
    one_block={"num_layers": 1},
    joint_block={"num_layers": 1},
    no_block={"num_layers": 0},
    graphs=1,
    stacks={"layers": "self_attention"},
    paddings={"lengths": True},
    stretch=stretch("pos_embed"),
    refuses=REFUSES,
    lacks=LACKS,
    brief=True,
)


def hidream(**config) -> Any:
    """A model with a layer of Llama's for each block."""
    blocks = config.get("num_layers", 2) + config.get("num_single_layers", 2)
    return models.tiny_hidream(**{"llama_layers": [0, 1, 1, 0][:blocks], "max_resolution": (40, 40), **config})


HIDREAM_TOKENS = 400
"""Of an image that is not square, in the small model."""


def hidream_text(shape: Shape) -> tuple[int, ...]:
    tokens = shape.height * shape.width
    return (3 * shape.text_len + (0 if shape.height == shape.width else HIDREAM_TOKENS - tokens),)


HIDREAM = Row(
    "hidream",
    "HiDream-I1",
    hidream,
    shaped(models.hidream_call),
    text_first=False,
    head_64=models.HIDREAM_64,
    # Whole graphs, which experts, counted on the host, do not have in the stock model either.
    one_block={**FLUX_BLOCK, "num_routed_experts": 0},
    joint_block={"num_layers": 1, "num_single_layers": 0},
    no_block={"num_layers": 0, "num_single_layers": 0},
    graphs=2,
    stacks={"double_stream_blocks": "block.attn1", "single_stream_blocks": "block.attn1"},
    text_lens=hidream_text,
    stretch=stretch("pe_embedder"),
    refuses={
        **REFUSES,
        "padding": Refused(MASK_HELD, call=mask_among("attention_kwargs")),
        "references": Refused(
            "takes no img_ids: tokens that are packed", call=lambda shape: {"img_ids": torch.zeros(1, 3)}
        ),
    },
    lacks={name: why for name, why in LACKS.items() if name != "references"},
    one_graph=False,
    brief=True,
)


def lumina2_call(shape: Shape) -> dict[str, Any]:
    call = shaped(models.lumina2_call)(shape)
    return {**call, "encoder_attention_mask": keep(shape).to(torch.int64)}


def stretch_lumina2(model, factor: float) -> None:
    own = model.rope_embedder
    model.rope_embedder = type(own)(own.theta * factor, own.axes_dim, own.axes_lens, own.patch_size)


LUMINA2 = Row(
    "lumina2",
    "Lumina 2",
    models.tiny_lumina2,
    lumina2_call,
    text_first=True,
    head_64=models.LUMINA2_64,
    one_block={"num_layers": 1},
    joint_block={"num_layers": 1},
    no_block={"num_layers": 0, "num_refiner_layers": 0},
    graphs=3,  # its refiner of captions compiles as well
    stacks={"noise_refiner": "attn", "layers": "attn"},
    text_lens=lambda shape: (0, max(shape.kept)),
    other_lens=lambda shape: (shape.text_len,),
    adjoins=True,
    paddings={"captions": True},
    stretch=stretch_lumina2,
    refuses=REFUSES,
    lacks=LACKS,
    one_graph=False,
    brief=True,
)


def of_whole_slots(shape: Shape) -> Shape:
    """The next size whose tokens are a multiple of four."""
    widths = range(shape.width, shape.width + 4)
    return dataclasses.replace(shape, width=next(width for width in widths if not shape.height * width % 4))


def qwen21_call(shape: Shape) -> dict[str, Any]:
    fitted = of_whole_slots(shape)
    call = shaped(models.qwen21_call)(fitted)
    return {**call, "encoder_hidden_states_mask": keep(shape).to(torch.int64)} if shape.padding else call


def stretch_qwen21(model, factor: float) -> None:
    own = model.pos_embed
    model.pos_embed = type(own)(own.theta * factor, own.axes_dim)


QWEN_IMAGE21 = Row(
    "qwen21",
    "Qwen-Image 2.1",
    models.tiny_qwen21,
    qwen21_call,
    text_first=True,
    head_64=models.QWEN21_64,
    one_block={"num_layers": 1},
    joint_block={"num_layers": 1},
    no_block={"num_layers": 0},
    graphs=1,
    stacks={"transformer_blocks": "attn"},
    image=lambda output, shape: output[:, -math.prod((of_whole_slots(shape).height, of_whole_slots(shape).width)) :],
    fitted=of_whole_slots,
    other_lens=lambda shape: (shape.text_len,),  # text over itself
    paddings={"int": True},
    stretch=stretch_qwen21,
    refuses=REFUSES,
    lacks={**LACKS, "references": "its condition images are part of the text"},
    one_graph=False,
    brief=True,
)

ROWS = (AURAFLOW, COGVIEW4, HUNYUAN_IMAGE, GLM_IMAGE, ERNIE_IMAGE, HIDREAM, LUMINA2, QWEN_IMAGE21)
