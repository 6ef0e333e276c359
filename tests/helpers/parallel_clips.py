"""Videos that several processes share; every function is called on every rank."""

from __future__ import annotations

import torch.distributed as dist

import flexclear
from flexclear import parallel
from flexclear.masks import Layout, suited
from flexclear.parallel.costs import border_bytes, output_bytes
from flexclear.parallel.planning import cut
from flexclear.runtime.hooks import entry_hook_of

from helpers import models_joint_video, models_video
from helpers.parallel_cases import run

MODELS = {
    "wan": (models_video.tiny_wan, models_video.WAN_64, models_video.wan_call, 0),
    "skyreels": (models_video.tiny_skyreels, models_video.WAN_64, models_video.skyreels_call, 0),
    "hunyuan video": (
        models_joint_video.tiny_hunyuan_video,
        models_joint_video.ROPE_64,
        models_joint_video.hunyuan_video_call,
        1,
    ),
}
"""Functions that make a model with heads of 64 and a call, and how many of the call's text tokens are in the sequence."""


def clip_against_one(kind, shape, text_len, r, batch=1, call_options=None, enable_options=None, **options):
    """Greatest difference between a shared video model and a whole one; and the bytes that a rank sends, and should send.

    Args:
        kind: a key of ``MODELS``.
        shape: frames, rows and columns of tokens.
        text_len: text tokens of the prompt.
        r, options: arguments of ``flexclear.transform``.
        call_options, enable_options: arguments of the call, and of ``flexclear.parallel.enable``.
    """
    build, size, make, in_sequence = MODELS[kind]
    model, call = build(**size), make(*shape, text_len, batch, **(call_options or {}))
    dense = run(model, call)
    flexclear.transform(model, r=r, backend="sdpa", **options)
    whole = run(model, call)
    parallel.enable(model, **(enable_options or {}))
    shared, sent = run(model, call), parallel.sent_bytes(model)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    settings = entry_hook_of(model).settings
    windows = [window for _, window in settings.slots]
    layout = Layout(*shape[1:], text_len * in_sequence, entry_hook_of(model).family.text_first, frames=shape[0])
    layout = suited(layout, windows[0])
    bands = cut(layout, ranks, (enable_options or {}).get("shares"), windows=windows)
    heads = model.config.num_attention_heads
    parallel.disable(model)
    after = run(model, call)
    return {
        "error": (shared - whole).abs().max().item(),
        "window": (dense - whole).abs().max().item(),
        "after": (after - whole).abs().max().item(),
        "sum": shared.double().sum().item(),
        "axis": bands.axis,
        "border": sent.get("border", 0),
        "planned border": sum(
            border_bytes(layout, window, bands, rank, heads * 64, 4, batch) for window in settings.windows.values()
        ),
        "output": sent.get("output", 0),
        "planned output": output_bytes(layout, bands, model.proj_out.out_features, 4, batch),
    }
