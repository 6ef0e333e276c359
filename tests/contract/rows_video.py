"""Rows of video models whose attention is over the video's tokens alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .pieces import FORMULAS, NO_ADAPTER, POOLED, fuse, share
from .row import Refused, Row
from .shapes import Shape
from helpers import models_video as models

FRAMES = 3

CROSS = "text reaches the video by cross-attention, which stays as it is"

LACKS = {
    "references": "the model takes one video",
    "padding": CROSS,
    "residuals": "the model takes no residuals",
    "ids": "positions come from sizes",
    "ip-adapter": NO_ADAPTER,
}

REFUSES = {
    "pooled keys": POOLED,
    "formulas": FORMULAS,
    "ranks": Refused("cannot be shared by several ranks: the model makes its tokens itself", afterwards=share),
}

WITHOUT_RANKS = {name: refused for name, refused in REFUSES.items() if name != "ranks"}


def in_frames(shape: Shape) -> Shape:
    """The shape of a video, of as many frames as the rows have unless it says otherwise."""
    return dataclasses.replace(shape, frames=FRAMES) if shape.frames is None else shape


def shaped(make: Callable[..., dict[str, Any]], **options) -> Callable[[Shape], dict[str, Any]]:
    """A call of a shape, by a function of its sizes."""

    def call(shape: Shape) -> dict[str, Any]:
        shape = in_frames(shape)
        return make(shape.frames, shape.height, shape.width, shape.text_len, shape.batch, shape.seed, **options)

    return call


def stretch_wan(model, factor: float) -> None:
    own = model.rope
    model.rope = type(own)(own.attention_head_dim, own.patch_size, own.max_seq_len, 10000.0 * factor)


def self_attention_mask(shape: Shape) -> dict[str, Any]:
    length = FRAMES * shape.height * shape.width
    return {"video_self_attention_mask": torch.ones(shape.batch, length, length)}


VIDEO = {
    "text_first": True,
    "text_lens": lambda shape: (0,),
    "other_lens": lambda shape: (shape.text_len,),
    "fitted": in_frames,
    "alone": True,
    "video": True,
    "brief": True,
}

BLOCKS = {
    **VIDEO,
    "head_64": models.WAN_64,
    "one_block": {"num_layers": 1},
    "joint_block": {"num_layers": 1},
    "no_block": {"num_layers": 0},
    "graphs": 1,
    "stacks": {"blocks": "attn1"},
    "stretch": stretch_wan,
    "fuse": fuse,
    "refuses": REFUSES,
    "lacks": LACKS,
}

WAN = Row(
    "wan",
    "Wan 2.1, 2.2",
    models.tiny_wan,
    shaped(models.wan_call),
    **{**BLOCKS, "refuses": WITHOUT_RANKS},
)

TIMES = {
    **BLOCKS,
    "joint_block": None,  # it would be Wan's
    "refuses": WITHOUT_RANKS,
    "lacks": {**LACKS, "ranks": "ranks do not share a time for each token or frame, and the call says so"},
}

WAN_TOKENS = Row(
    "wan_tokens",
    "Wan 2.2 TI2V",
    models.tiny_wan,
    shaped(models.wan_call, times="tokens"),
    **TIMES,
)


def vace(num_layers: int = 2, **config) -> Any:
    """A model whose control blocks are as many as its own, none too, which diffusers does not make."""
    model = models.tiny_vace(num_layers=num_layers or 1, vace_layers=list(range(num_layers or 1)), **config)
    if not num_layers:
        model.blocks, model.vace_blocks = torch.nn.ModuleList(), torch.nn.ModuleList()
    return model


WAN_VACE = Row(
    "vace",
    "Wan VACE",
    vace,
    shaped(models.vace_call),
    **{
        **BLOCKS,
        "joint_block": None,
        "graphs": 2,
        "stacks": {"vace_blocks": "attn1", "blocks": "attn1"},
    },
)

SKYREELS_V2 = Row(
    "skyreels",
    "SkyReels V2",
    models.tiny_skyreels,
    shaped(models.skyreels_call, times="frames"),
    **TIMES,
)

LTX = Row(
    "ltx",
    "LTX-Video",
    models.tiny_ltx,
    shaped(models.ltx_call),
    **{
        **BLOCKS,
        "head_64": models.LTX_64,
        "stacks": {"transformer_blocks": "attn1"},
        "stretch": None,
        "fuse": None,
        "refuses": {
            **REFUSES,
            "ntk": Refused("shares of a largest size.*an NTK factor is not defined", {"ntk_factor": 10.0}),
        },
        "lacks": {**LACKS, "fuse": "its projections are never run fused in diffusers"},
        "optional": ("encoder_attention_mask",),
    },
)

LTX2 = Row(
    "ltx2",
    "LTX-2",
    models.tiny_ltx2,
    shaped(models.ltx2_call),
    **{
        **{name: getattr(LTX, name) for name in (*BLOCKS, "optional")},
        "text_first": False,
        "other_lens": lambda shape: (shape.text_len, models.SOUND),
    },
)

ROWS = (WAN, WAN_TOKENS, WAN_VACE, SKYREELS_V2, LTX, LTX2)
