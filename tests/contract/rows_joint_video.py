"""Rows of video models with text in the sequence, and of those that take packed sequences."""

from __future__ import annotations

from typing import Any

import torch

from .pieces import FLUX_BLOCK, FLUX_STACKS, FORMULAS, MASK_HELD, NO_ADAPTER, POOLED, fuse, keep, mask_among, share
from .row import Refused, Row
from .rows_video import in_frames, shaped
from .shapes import Shape
from helpers import models_joint_video as models

LACKS = {
    "references": "the model takes one video",
    "residuals": "the model takes no residuals",
    "ids": "positions come from sizes",
    "ip-adapter": NO_ADAPTER,
}
NOT_FUSED = "its projections are never run fused in diffusers"
ALL_ATTENDED = "the model takes no mask, and attends to the padding"

REFUSES = {
    "pooled keys": POOLED,
    "formulas": FORMULAS,
    "ranks": Refused("cannot be shared by several ranks: the model makes its tokens itself", afterwards=share),
}

WITHOUT_RANKS = {name: refused for name, refused in REFUSES.items() if name != "ranks"}

VIDEO: dict[str, Any] = {
    "fitted": in_frames,
    "video": True,
    "brief": True,
}

ONE_STACK: dict[str, Any] = {
    **VIDEO,
    "one_block": {"num_layers": 1},
    "joint_block": {"num_layers": 1},
    "no_block": {"num_layers": 0},
    "graphs": 1,
}


def stretch(model, factor: float) -> None:
    model.rope.theta *= factor


def masked(make, name: str = "encoder_attention_mask", dtype: torch.dtype = torch.int64):
    """A call with the mask of its padded text."""
    return lambda shape: {**shaped(make)(shape), name: keep(shape).to(dtype)}


HUNYUAN_VIDEO = Row(
    "hunyuan_video",
    "HunyuanVideo",
    models.tiny_hunyuan_video,
    masked(models.hunyuan_video_call),
    **VIDEO,
    text_first=False,
    head_64=models.ROPE_64,
    one_block=FLUX_BLOCK,
    joint_block={"num_layers": 1, "num_single_layers": 0},
    no_block={"num_layers": 0, "num_single_layers": 0},
    graphs=4,  # patches and the refiner of the text compile as well
    stacks=FLUX_STACKS,
    other_lens=lambda shape: (shape.text_len,),  # its refiner of the text
    paddings={"int": True},
    stretch=stretch,
    refuses=WITHOUT_RANKS,
    lacks={**LACKS, "fuse": NOT_FUSED},
)

HUNYUAN_VIDEO_I2V = Row(
    **{
        **{name: getattr(HUNYUAN_VIDEO, name) for name in HUNYUAN_VIDEO.__dataclass_fields__},
        "name": "hunyuan_video_i2v",
        "title": "HunyuanVideo I2V",
        "make": lambda **config: models.tiny_hunyuan_video(image_condition_type="token_replace", **config),
        "joint_block": None,  # it would be HunyuanVideo's
        "refuses": {
            **REFUSES,
            "ranks": Refused("tells the tokens of the first frame.*by their place", afterwards=share),
        },
    }
)

HUNYUAN_VIDEO15 = Row(
    "hunyuan_video15",
    "HunyuanVideo 1.5",
    models.tiny_hunyuan_video15,
    masked(models.hunyuan_video15_call),
    **{**ONE_STACK, "graphs": 3},
    text_first=False,
    head_64=models.ROPE_64,
    stacks={"transformer_blocks": "attn"},
    text_lens=lambda shape: (shape.text_len + models.GLYPHS + models.IMAGE_TOKENS,),
    other_lens=lambda shape: (shape.text_len,),
    paddings={"int": True},
    stretch=stretch,
    refuses=WITHOUT_RANKS,
    lacks={**LACKS, "fuse": NOT_FUSED},
    one_graph=False,
)


COGVIDEOX = Row(
    "cogvideox",
    "CogVideoX",
    models.tiny_cogvideox,
    shaped(models.cogvideox_call),
    **ONE_STACK,
    text_first=True,
    head_64={},  # it has them already: the pipeline makes positions of as many channels
    stacks={"transformer_blocks": "attn1"},
    fuse=fuse,
    fusing_replaces=True,
    refuses={
        **REFUSES,
        "padding": Refused(MASK_HELD, call=mask_among("attention_kwargs")),
        "ntk": Refused("its pipelines make the rotary embedding", {"ntk_factor": 10.0}),
    },
    lacks={**LACKS, "ids": "the pipeline makes the rotary embedding"},
)


def stretch_minimax_h3(model, factor: float) -> None:
    config = model.config
    model.rope = type(model.rope)(config.rope_freq_dim, config.rope_theta * factor)


MINIMAX_H3 = Row(
    "minimax_h3",
    "MiniMax-H3",
    models.tiny_minimax_h3,
    shaped(models.minimax_h3_call, later=0.7),
    **{**ONE_STACK, "graphs": 2},
    text_first=True,
    head_64=models.MINIMAX_H3_64,
    stacks={"transformer_blocks": "attn"},
    text_lens=lambda shape: (shape.text_len + 8,),  # and two channels of sound
    other_lens=lambda shape: (shape.text_len,),
    ids="position_ids",
    stretch=stretch_minimax_h3,
    fuse=fuse,
    refuses=REFUSES,
    lacks={**LACKS, "ids": "positions are the pipeline's, and stay as they are", "padding": "the sequence has none"},
)


def cosmos3_call(shape: Shape) -> dict[str, Any]:
    """Of one sample, whatever the shape says."""
    shape = in_frames(shape)
    return models.cosmos3_call(shape.frames, shape.height, shape.width, shape.text_len, shape.seed, conditions=1)


COSMOS3 = Row(
    "cosmos3",
    "Cosmos 3",
    models.tiny_cosmos3,
    cosmos3_call,
    **{
        **ONE_STACK,
        "one_block": {"num_hidden_layers": 1},
        "joint_block": {"num_hidden_layers": 1},
        "no_block": {"num_hidden_layers": 0},
    },
    text_first=True,
    head_64=models.COSMOS3_64,
    stacks={"layers": "self_attn"},
    other_lens=lambda shape: (shape.text_len,),  # the text over itself
    refuses={
        **REFUSES,
        "ntk": Refused("one rotary embedding for the video and for its language model", {"ntk_factor": 10.0}),
    },
    lacks={**LACKS, "fuse": NOT_FUSED, "padding": "the model takes one sample"},
)

MOCHI = Row(
    "mochi",
    "Mochi",
    models.tiny_mochi,
    masked(models.mochi_call, dtype=torch.bool),
    **ONE_STACK,
    text_first=False,
    head_64=models.MOCHI_64,
    stacks={"transformer_blocks": "attn1"},
    text_lens=lambda shape: tuple(sorted(set(shape.kept))),
    paddings={"bool": True},
    ragged=True,
    refuses={**WITHOUT_RANKS, "ntk": Refused("learns its rotary frequencies", {"ntk_factor": 10.0})},
    lacks={**LACKS, "fuse": NOT_FUSED},
    one_graph=False,  # it counts each sample's text on the host
)

ROWS = (HUNYUAN_VIDEO, HUNYUAN_VIDEO_I2V, HUNYUAN_VIDEO15, COGVIDEOX, MINIMAX_H3, COSMOS3, MOCHI)
