"""What the processes of ``parallel_group.Group`` are refused: ranks that differ, or requests that cannot be met."""

from __future__ import annotations

import torch.distributed as dist

import flexclear
from flexclear import parallel

from helpers.models import flux_call, tiny_flux
from helpers.parallel_cases import run
from helpers.parallel_families import build


def disagreeing(what, rank=1):
    """A call in which one rank differs, then one in which none does."""
    mine = dist.get_rank() == rank
    model = tiny_flux(seed=1 if mine and what == "weights" else 0)
    flexclear.transform(model, r=4 if mine and what == "radius" else 3, backend="sdpa")
    height = 24 if mine and what == "size" else 16
    call = flux_call(height, 16, 12, seed=1 if mine and what == "seed" else 0)
    if mine and what == "prompt":
        call["encoder_hidden_states"] = -call["encoder_hidden_states"]
    parallel.enable(model, text="average" if mine and what == "settings" else "exact")
    try:
        run(model, call)
    finally:
        parallel.disable(model)


def refused(what):
    """Something that cannot be shared."""
    options = {}
    if what in ("too small", "fewer"):
        model, call = tiny_flux(), flux_call(8, 8, 12)
        options = {"too_small": "fewer"} if what == "fewer" else {}
    elif what == "skipped":
        model, call = build("sd3")
        call["skip_layers"] = [0]
    else:
        model, call = build("flux")
    flexclear.transform(model, r=3, backend="sdpa")
    whole = None if what == "skipped" else run(model, call)
    parallel.enable(model, **options)
    if what == "gradients":
        return model(**call).sample
    if what == "dense cache":
        from diffusers import FirstBlockCacheConfig

        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    return (run(model, call) - whole).abs().max().item()
