"""What the processes of ``group.Group`` run. Every function is called on every rank."""

from __future__ import annotations

import warnings

import diffusers  # noqa: F401
import torch
import torch.distributed as dist

import flexclear
from flexclear import parallel
from flexclear.families import flux_attention, sd3_attention  # noqa: F401

from models import flux_call, tiny_flux

warnings.filterwarnings("ignore", message="flexclear: ")


def awake():
    """So that the bars of a pipeline are quiet, and to know that a process is there."""
    parallel.enabling._ranks(None)
    return dist.get_rank()


def run(model, call):
    with torch.no_grad():
        return model(**call).sample


def flux_against_one(
    height, width, text_len, r, batch=1, order="tiled", backend="sdpa", down_factor=None, seed=0, **options
):
    """Greatest difference of a shared FLUX to a whole one, and of a whole one to the dense one."""
    model = tiny_flux(seed)
    call = flux_call(height, width, text_len, batch, seed)
    dense = run(model, call)
    flexclear.transform(model, r=r, backend=backend, order=order, down_factor=down_factor)
    whole = run(model, call)
    shared = run(parallel.enable(model, **options), call)
    again = run(model, call)
    sent = parallel.sent_bytes(model)
    parallel.disable(model)
    after = run(model, call)
    return {
        "error": (shared - whole).abs().max().item(),
        "again": (again - shared).abs().max().item(),
        "after": (after - whole).abs().max().item(),
        "window": (dense - whole).abs().max().item(),
        "sent": sent,
        "sum": shared.double().sum().item(),
    }
