"""Functions for the processes of ``parallel_group.Group``. Every function is called on every rank."""

from __future__ import annotations

import itertools
import warnings

import diffusers  # noqa: F401
import torch
import torch.distributed as dist

import flexclear
from flexclear import parallel
from flexclear.parallel.group import ranks_of

from helpers.models import flux_call, tiny_flux

warnings.filterwarnings("ignore", message="flexclear: ")


def awake():
    """Silence the progress bars of pipelines, and show that a process is ready."""
    ranks_of(None)
    return dist.get_rank()


def run(model, call):
    with torch.no_grad():
        return model(**call).sample


def flux_against_one(
    height, width, text_len, r, batch=1, order="tiled", backend="sdpa", down_factor=None, seed=0, **options
):
    """Greatest difference between a shared FLUX and a whole one, and between a whole one and the dense one."""
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


def dense_against_one(kind, height, width, text_len, batch=1):
    """Greatest difference between a dense FLUX that diffusers shares and a whole one; and the same for a whole one afterwards."""

    def outcome(model, call):
        with torch.no_grad():
            return model(**call)[0]

    from diffusers import attention_backend

    model = tiny_flux()
    # As in pipelines: diffusers splits and gathers only tensors.
    call = {**flux_call(height, width, text_len, batch), "return_dict": False}
    # set_attention_backend also changes the process-wide default; leaving the context restores it.
    with attention_backend("native"):
        if kind == "ring":
            model.set_attention_backend("_native_flash")
        whole = outcome(model, call)
        shared = outcome(parallel.enable_dense(model, kind=kind), call)
        enabled = model._parallel_config is not None
        parallel.disable(model)
        after = outcome(model, call)
    return {
        "error": (shared - whole).abs().max().item(),
        "after": (after - whole).abs().max().item(),
        "enabled": enabled,
        "left": model._parallel_config,
    }


def dense_with_an_attention_that_diffusers_cannot_share():
    """The error message, what is left in the model, and how far its output then is from the original one."""
    model, call = tiny_flux(), flux_call(8, 8, 8)
    before = run(model, call)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.processor._attention_backend = "flex"
    try:
        parallel.enable_dense(model, kind="ulysses")
    except ValueError as error:
        said = str(error)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.processor._attention_backend = None
    return {"said": said, "left": model._parallel_config, "error": (run(model, call) - before).abs().max().item()}


def two_pictures_at_once(r=4):
    """Four ranks as two groups of two, each with its own image."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pictures", "bands"))
    picture = mesh["pictures"].get_local_rank()
    model = tiny_flux()
    call = flux_call(16 + 8 * picture, 10, 12, seed=picture)
    whole = run(flexclear.transform(model, r=r, backend="sdpa"), call)
    try:
        parallel.enable(model, mesh)
    except ValueError as error:
        refused = str(error)
    shared = run(parallel.enable(model, mesh["bands"]), call)
    return {"error": (shared - whole).abs().max().item(), "sum": whole.sum().item(), "refused": refused}


class PatchText:
    """Paper Eq. 7 by hand for a single-stream layer's queries, keys and values: every rank's text, then their average."""

    def __init__(self, layout, edges, r):
        _, y, x = layout.coordinates()
        self.inside = (y[:, None] - y[None]) ** 2 + (x[:, None] - x[None]) ** 2 < r * r
        self.patches = [(y >= first) & (y < stop) for first, stop in itertools.pairwise(edges)]
        self.text_len = layout.text_len

    def __call__(self, query, key, value):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        count = self.text_len
        text = 0
        for patch in self.patches:
            seen = torch.cat([torch.ones(count, dtype=torch.bool), patch])
            text = text + scores[:, :, :count].masked_fill(~seen, -torch.inf).softmax(-1) @ value / len(self.patches)
        visible = torch.cat([torch.ones(len(self.inside), count, dtype=torch.bool), self.inside], 1)
        image = scores[:, :, count:].masked_fill(~visible, -torch.inf).softmax(-1) @ value
        return torch.cat([text, image], 2)


def average_against_eq_7(height, width, text_len, r, edges, **options):
    """A shared FLUX with averaged text, and one whose attention is Eq. 7 written out."""
    from unittest import mock

    from flexclear.masks import Layout

    model = tiny_flux()
    call = flux_call(height, width, text_len, 2)
    flexclear.transform(model, r=r, backend="sdpa", order="raster")
    exact = run(model, call)
    by_hand = PatchText(Layout(height, width, text_len, order="raster"), edges, r)
    with mock.patch("flexclear.runtime.call_plan.windowed_attention", lambda q, k, v, *others: by_hand(q, k, v)):
        expected = run(model, call)
    flexclear.transform(model, r=r, backend="sdpa")
    shared = run(parallel.enable(model, text="average", **options), call)
    return {"error": (shared - expected).abs().max().item(), "exact": (exact - expected).abs().max().item()}
