"""The table of families: how a small real model of diffusers is built and called, what it supports, what it refuses.

A new family is one more row here; the tests, and ``docs/support.md``, follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import rows_packed
from .pieces import (
    FLUX_BLOCK,
    FLUX_STACKS,
    FORMULAS,
    MASK_HELD,
    NO_ADAPTER,
    NO_FUSING,
    NO_IDS,
    POOLED,
    fuse,
    image_len,
    image_residuals,
    keep,
    mask_among,
    noise,
    stretch_theta,
    with_mask,
)
from .row import Refused, Row
from .rows_joint_video import ROWS as JOINT_VIDEO
from .rows_latents import ROWS as LATENTS
from .rows_video import ROWS as VIDEO
from .shapes import Shape
from helpers import models


def with_references(call: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """A FLUX-like call with the tokens of reference images behind its own."""
    for number, grid in enumerate(shape.references, 1):
        ids = models.raster_ids(*grid)
        ids[:, 0] = number
        tokens = noise(shape.batch, len(ids), 8, seed=number)
        call["hidden_states"] = torch.cat([call["hidden_states"], tokens], 1)
        call["img_ids"] = torch.cat([call["img_ids"], ids])
    return call


def flux_call(shape: Shape) -> dict[str, Any]:
    call = models.flux_call(shape.height, shape.width, shape.text_len, shape.batch, shape.seed)
    return with_mask(with_references(call, shape), shape)


def flux2_call(shape: Shape) -> dict[str, Any]:
    grid = (shape.height, shape.width)
    return with_mask(models.flux2_call(grid, shape.references, shape.text_len, shape.batch, shape.seed), shape)


def qwen_call(shape: Shape) -> dict[str, Any]:
    dtype = {"bool": torch.bool, "int": torch.int64, "float": torch.float32, None: None}[shape.padding]
    mask = None if dtype is None else keep(shape).to(dtype)
    grid = (shape.height, shape.width)
    return models.qwen_call(grid, shape.references, shape.text_len, shape.batch, shape.seed, mask)


def sd3_call(shape: Shape) -> dict[str, Any]:
    return models.sd3_call(shape.height, shape.width, shape.text_len, shape.batch, shape.seed)


def chroma_call(shape: Shape) -> dict[str, Any]:
    call = models.chroma_call(shape.height, shape.width, shape.text_len, shape.batch, shape.seed)
    call = with_references(call, shape)
    if shape.padding:
        mask = torch.cat([keep(shape), torch.ones(shape.batch, image_len(shape), dtype=torch.bool)], 1)
        call["attention_mask"] = mask if shape.padding == "bool" else mask.float()
    return call


def zimage_call(shape: Shape) -> dict[str, Any]:
    return models.zimage_call(shape.height, shape.width, shape.kept, shape.seed)


def zimage_text(shape: Shape) -> tuple[int, ...]:
    """Pads of the image alone, and with the longest caption."""
    pads = models.padded(image_len(shape)) - image_len(shape)
    return pads, pads + models.padded(max(shape.kept))


def zimage_residuals(shape: Shape) -> dict[str, Any]:
    length = image_len(shape) + max(zimage_text(shape))
    return {"controlnet_block_samples": {0: noise(shape.batch, length, 32)}}


def stretch_qwen(model, factor: float) -> None:
    embed = model.pos_embed
    model.pos_embed = type(embed)(int(embed.theta * factor), embed.axes_dim, scale_rope=True)


def stretch_zimage(model, factor: float) -> None:
    """Wherever there are image tokens; captions alone keep the frequencies that the model has."""
    places = torch.zeros(96, 3, dtype=torch.int64)
    places[:, 0] = torch.arange(1, 97)
    embed = model.rope_embedder
    own = embed(places)[None]
    model.rope_embedder = type(embed)(embed.theta * factor, embed.axes_dims, embed.axes_lens)
    for block in model.context_refiner:
        block.register_forward_pre_hook(lambda module, args: (args[0], args[1], own[:, : args[0].shape[1]], *args[3:]))


def flux_adapter(model, shape: Shape) -> dict[str, Any]:
    """An IP-Adapter of two image tokens in the double-stream blocks, as ``load_ip_adapter`` puts it there."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    torch.manual_seed(7)
    for block in model.transformer_blocks:
        width = block.attn.to_q.in_features
        block.attn.set_processor(FluxIPAdapterAttnProcessor(width, 12, num_tokens=(2,), scale=0.7))
    return {"joint_attention_kwargs": {"ip_hidden_states": [noise(shape.batch, 2, 12)]}}


def sd3_adapter(model) -> None:
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    model.transformer_blocks[1].attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, 8))


FLUX = Row(
    "flux",
    "FLUX.1",
    models.tiny_flux,
    flux_call,
    text_first=True,
    head_64={"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)},
    one_block=FLUX_BLOCK,
    joint_block={"num_layers": 1, "num_single_layers": 0},
    no_block={"num_layers": 0, "num_single_layers": 0},
    graphs=2,
    stacks=FLUX_STACKS,
    residuals=image_residuals("controlnet_block_samples", "controlnet_single_block_samples"),
    adapter=flux_adapter,
    stretch=stretch_theta,
    fuse=fuse,
    paddings={"bool": True},
)

FLUX2 = Row(
    "flux2",
    "FLUX.2",
    models.tiny_flux2,
    flux2_call,
    text_first=True,
    head_64={"attention_head_dim": 64, "axes_dims_rope": (16, 16, 16, 16)},
    one_block=FLUX_BLOCK,
    joint_block={"num_layers": 1, "num_single_layers": 0},
    no_block={"num_layers": 0, "num_single_layers": 0},
    graphs=2,
    stacks=FLUX_STACKS,
    stretch=stretch_theta,
    fuse=fuse,
    paddings={"bool": True},
    refuses={"pooled keys": POOLED, "formulas": FORMULAS},
    lacks={"residuals": "the model takes none", "ip-adapter": NO_ADAPTER},
)

QWEN = Row(
    "qwen",
    "Qwen-Image",
    models.tiny_qwen,
    qwen_call,
    text_first=True,
    head_64={"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)},
    one_block={"num_layers": 1},
    joint_block={"num_layers": 1},
    no_block={"num_layers": 0},
    graphs=1,
    stacks={"transformer_blocks": "attn"},
    paddings={"bool": True, "int": True, "float": True},
    residuals=image_residuals("controlnet_block_samples"),
    stretch=stretch_qwen,
    refuses={
        "pooled keys": POOLED,
        "formulas": FORMULAS,
    },
    lacks={"ids": NO_IDS, "fuse": NO_FUSING, "ip-adapter": NO_ADAPTER},
)

SD3 = Row(
    "sd3",
    "SD3",
    models.tiny_sd3,
    sd3_call,
    text_first=False,
    head_64={"attention_head_dim": 64, "caption_projection_dim": 128},
    one_block={"num_layers": 2},  # the last one is of another kind
    joint_block={"num_layers": 1},
    no_block={"num_layers": 0},
    graphs=2,
    stacks={"transformer_blocks": "attn"},
    residuals=image_residuals("block_controlnet_hidden_states"),
    fuse=fuse,
    fusing_replaces=True,
    refuses={
        "padding": Refused(MASK_HELD, call=mask_among("joint_attention_kwargs")),
        "ntk": Refused("has no rotary positions", {"ntk_factor": 10.0}),
        "ip-adapter": Refused("SD3's IP-Adapter.*there is no window yet", prepare=sd3_adapter, error=TypeError),
        "pooled keys": POOLED,
        "formulas": FORMULAS,
    },
    lacks={"references": "the model takes one image", "ids": "positions are added to the tokens"},
)

SD35 = Row(
    **{
        **{name: getattr(SD3, name) for name in SD3.__dataclass_fields__},
        "name": "sd35",
        "title": "SD3.5 medium",
        "make": lambda **config: models.tiny_sd3(**{**models.SD35, **config}),
        "joint_block": None,  # it would be SD3's
        "text_lens": lambda shape: (shape.text_len, 0),
    }
)

CHROMA = Row(
    "chroma",
    "Chroma",
    models.tiny_chroma,
    chroma_call,
    text_first=True,
    head_64={"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)},
    one_block=FLUX_BLOCK,
    joint_block={"num_layers": 1, "num_single_layers": 0},
    no_block={"num_layers": 0, "num_single_layers": 0},
    graphs=2,
    stacks=FLUX_STACKS,
    paddings={"bool": True, "float": False},
    residuals=image_residuals("controlnet_block_samples", "controlnet_single_block_samples"),
    adapter=flux_adapter,
    stretch=stretch_theta,
    fuse=fuse,
    refuses={"pooled keys": POOLED, "formulas": FORMULAS},
)

ZIMAGE = Row(
    "zimage",
    "Z-Image",
    models.tiny_zimage,
    zimage_call,
    text_first=False,
    head_64={"dim": 128, "axes_dims": [16, 24, 24]},
    one_block={"n_layers": 1},
    joint_block={"n_layers": 1},
    no_block={"n_layers": 0, "n_refiner_layers": 0},
    graphs=3,
    one_graph=False,
    stacks={"noise_refiner": "attention", "layers": "attention"},
    text_lens=zimage_text,
    other_lens=lambda shape: (models.padded(max(shape.kept)),),  # its refiner of captions
    paddings={"captions": True},
    residuals=zimage_residuals,
    stretch=stretch_zimage,
    refuses={
        "references": Refused("the Omni mode", call=lambda shape: {"x": [[noise(4, 1, 8, 8)]] * shape.batch}),
        "pooled keys": POOLED,
        "formulas": FORMULAS,
    },
    lacks={"ids": NO_IDS, "fuse": NO_FUSING, "ip-adapter": NO_ADAPTER},
)

ROWS = (FLUX, FLUX2, QWEN, SD3, SD35, CHROMA, ZIMAGE, *rows_packed.ROWS, *LATENTS, *VIDEO, *JOINT_VIDEO)


def cases(shapes: Callable[[Row], list[Shape]], *abilities: str) -> pytest.MarkDecorator:
    """Parametrise a test's ``row`` and ``shape`` over the shapes of all families, or of those with the given abilities."""
    rows = [row for row in ROWS if row.abilities.issuperset(abilities)]
    found = [pytest.param(row, shape, id=f"{row.name}-{shape}") for row in rows for shape in shapes(row)]
    return pytest.mark.parametrize(("row", "shape"), found)


def every(*abilities: str) -> pytest.MarkDecorator:
    """Parametrise a test's ``row`` over all families, or over those with the given abilities."""
    rows = [row for row in ROWS if row.abilities.issuperset(abilities)]
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)
