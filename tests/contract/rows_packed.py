"""Rows of the models that are handed packed tokens and position ids: LongCat-Image, Ovis-Image, Bria."""

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
    mask_among,
    stretch_theta,
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
    lambda shape: models.ovis_call(*sizes(shape)),
    **FLUX_LIKE,
    refuses={
        "padding": Refused(MASK_HELD, call=mask_among("joint_attention_kwargs")),
        "pooled keys": POOLED,
        "formulas": FORMULAS,
    },
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

ROWS = (LONGCAT, OVIS, BRIA)
