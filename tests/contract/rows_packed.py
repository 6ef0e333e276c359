"""Rows of the models that are handed packed tokens and position ids: LongCat-Image, Ovis-Image, Bria, FIBO, Krea 2, FLUX.3."""

from __future__ import annotations

from typing import Any

import torch

from .pieces import (
    FLUX_BLOCK,
    FLUX_STACKS,
    FORMULAS,
    MASK_HELD,
    NO_ADAPTER,
    POOLED,
    fuse,
    image_residuals,
    keep,
    mask_among,
    share,
    stretch_theta,
    with_mask,
)
from .row import Refused, Row
from .shapes import Shape
from helpers import models_packed as models

NO_RESIDUALS = "the model takes none"
NO_REFERENCES = "diffusers has no pipeline that gives it any"


def sizes(shape: Shape) -> tuple[int, int, int, int, int]:
    return shape.height, shape.width, shape.text_len, shape.batch, shape.seed


def longcat_call(shape: Shape) -> dict[str, Any]:
    return models.longcat_call(*sizes(shape), references=shape.references)


def rounded_ids(shape: Shape) -> dict[str, Any]:
    """Of an image that begins at row 512, in a type that holds every fourth number there."""
    return {"img_ids": longcat_call(shape)["img_ids"].to(torch.bfloat16)}


FLUX_LIKE: dict[str, Any] = {
    "text_first": True,
    "head_64": models.HEAD_64,
    "one_block": FLUX_BLOCK,
    "joint_block": None,  # FLUX.1's kernel
    "no_block": {"num_layers": 0, "num_single_layers": 0},
    "graphs": 2,
    "stacks": FLUX_STACKS,
    "stretch": stretch_theta,
    "fuse": fuse,
    "brief": True,
}
"""What rows of models with FLUX.1's two stacks share."""

LONGCAT = Row(
    "longcat",
    "LongCat-Image",
    models.tiny_longcat,
    longcat_call,
    **FLUX_LIKE,
    refuses={
        "ids": Refused("begin at row 512.*does not tell neighbouring tokens apart", call=rounded_ids),
        "pooled keys": POOLED,
        "formulas": FORMULAS,
    },
    lacks={
        "padding": "the model takes no mask, and attends to the padding",
        "residuals": NO_RESIDUALS,
        "ip-adapter": NO_ADAPTER,
    },
)

OVIS = Row(
    "ovis",
    "Ovis-Image",
    models.tiny_ovis,
    lambda shape: with_mask(models.ovis_call(*sizes(shape)), shape),
    **FLUX_LIKE,
    paddings={"bool": True},
    refuses={"pooled keys": POOLED, "formulas": FORMULAS},
    lacks={"references": NO_REFERENCES, "residuals": NO_RESIDUALS, "ip-adapter": NO_ADAPTER},
)

BRIA = Row(
    "bria",
    "Bria 3.2",
    models.tiny_bria,
    lambda shape: models.bria_call(*sizes(shape)),
    **FLUX_LIKE,
    residuals=image_residuals("controlnet_block_samples"),
    refuses={
        "padding": Refused(MASK_HELD, call=mask_among("attention_kwargs")),
        "pooled keys": POOLED,
        "formulas": FORMULAS,
    },
    lacks={"references": NO_REFERENCES, "ip-adapter": NO_ADAPTER},
)


def fibo_call(shape: Shape) -> dict[str, Any]:
    return models.fibo_call(*sizes(shape), references=shape.references, keep=keep(shape))


FIBO = Row(
    "fibo",
    "Bria FIBO",
    models.tiny_fibo,
    fibo_call,
    # A call has a layer of the text encoder for each of the four blocks. The plain model's compile to three graphs as well.
    **{**FLUX_LIKE, "one_block": {}, "graphs": 3},
    paddings={"bool": True},
    refuses={"pooled keys": POOLED, "formulas": FORMULAS},
    lacks={"residuals": NO_RESIDUALS, "ip-adapter": NO_ADAPTER},
)


def krea2_keep(shape: Shape) -> torch.Tensor:
    """A prompt, its padding, and the end of the template behind it; or the padding at the end."""
    return models.krea2_keep(shape.kept, shape.text_len) if shape.padding == "middle" else keep(shape)


def krea2_call(shape: Shape) -> dict[str, Any]:
    return models.krea2_call(*sizes(shape), keep=krea2_keep(shape))


def stretch_krea2(model, factor: float) -> None:
    model.rotary_emb.theta *= factor


KREA2 = Row(
    "krea2",
    "Krea 2",
    models.tiny_krea2,
    krea2_call,
    text_first=True,
    head_64=models.HEAD_64,
    one_block={"num_layers": 1},
    joint_block={"num_layers": 1},
    no_block={"num_layers": 0},
    graphs=1,
    stacks={"transformer_blocks": "attn"},
    other_lens=lambda shape: (shape.text_len, 3),  # its text blocks: over tokens, and over the layers of the encoder
    paddings={"middle": True, "end": True},
    keep=krea2_keep,
    ids="position_ids",
    optional=("encoder_attention_mask",),
    stretch=stretch_krea2,
    fuse=fuse,  # which diffusers' processor makes nothing of
    brief=True,
    refuses={"pooled keys": POOLED, "formulas": FORMULAS},
    lacks={"references": "the model takes one image", "residuals": NO_RESIDUALS, "ip-adapter": NO_ADAPTER},
)


def flux3_parts(shape: Shape) -> tuple[Shape, ...]:
    """The image alone, and reference images alone."""
    image = Shape(shape.height, shape.width)
    if not shape.references:
        return (image,)
    (height, width), *others = shape.references
    return image, Shape(height, width, references=tuple(others))


FLUX3 = Row(
    "flux3",
    "FLUX.3",
    models.tiny_flux3,
    lambda shape: models.flux3_call(*sizes(shape), references=shape.references),
    **{
        **FLUX_LIKE,
        "head_64": models.FLUX3_HEAD_64,
        "graphs": 3,
        "stacks": {"mode_blocks.image": "attn", "mode_blocks.image_cond": "attn", "single_transformer_blocks": "attn"},
    },
    parts=flux3_parts,
    other_lens=lambda shape: (shape.text_len,),  # its blocks over text alone
    refuses={
        "pooled keys": POOLED,
        "formulas": FORMULAS,
        "ranks": Refused("cannot be shared by several ranks: its blocks attend over the image alone", afterwards=share),
    },
    lacks={
        "padding": "the model takes no mask, and attends to the padding",
        "residuals": NO_RESIDUALS,
        "ip-adapter": NO_ADAPTER,
    },
)

ROWS = (LONGCAT, OVIS, BRIA, FIBO, KREA2, FLUX3)
