"""Functions for the processes of ``parallel_group.Group``: small models of every family, also compiled and quantized."""

from __future__ import annotations

import copy
import importlib

import torch

import flexclear
from flexclear import parallel

from helpers import models
from helpers.models import flux_call, tiny_flux
from helpers.parallel_cases import run


def family(name):
    """The test module of a family, for its small pipelines."""
    return importlib.import_module(f"test_{name}")


def build(kind):
    """A small model and a call for it."""
    batch = {"batch": 2}
    if kind == "flux":
        return tiny_flux(), flux_call(16, 20, 12, 2)
    if kind == "flux with references":
        return tiny_flux(), with_reference(flux_call(16, 20, 12, 1), 26, 11)
    if kind == "flux2":
        return models.tiny_flux2(), models.flux2_call((16, 9), ((24, 8), (7, 12)), 10, 2)
    if kind == "sd3":
        return models.tiny_sd3(), models.sd3_call(16, 11, 12, 2)
    if kind == "sd3.5 with residuals":
        call = models.sd3_call(11, 18, 12)
        call["block_controlnet_hidden_states"] = [
            torch.randn(1, 11 * 18, 32, generator=torch.Generator().manual_seed(9))
        ]
        return models.tiny_sd3(**models.SD35), call
    if kind.startswith("chroma"):
        return models.tiny_chroma(), models.chroma_call(16, 13, 12, **batch, kind=kind.removeprefix("chroma, "))
    if kind.startswith("zimage"):
        return build_zimage(kind.removeprefix("zimage, "))
    mask = torch.ones(2, 12)
    mask[1, 7:] = 0
    return models.tiny_qwen(), models.qwen_call((16, 10), ((9, 14),), 12, 2, mask=mask)


def build_zimage(kind):
    """Z-Image with and without pads, in sizes at which a rank's own image has other numbers of pads than the whole one."""
    (height, width), captions, config = {
        "no pads": ((16, 16), (20,), {}),
        "pads, two captions": ((25, 9), (33, 7), {}),
        "no refiner": ((19, 13), (33, 7), {"n_refiner_layers": 0}),
        "as large as positions go": ((64, 5), (33, 7), {"axes_lens": [200, 64, 5]}),
    }[kind]
    return models.tiny_zimage(**config), models.zimage_call(height, width, captions)


def with_reference(call, height, width):
    """A FLUX call with the tokens of a reference image after its own."""
    from helpers.models import raster_ids

    ids = raster_ids(height, width)
    ids[:, 0] = 1
    tokens = torch.randn(len(call["hidden_states"]), height * width, 8, generator=torch.Generator().manual_seed(5))
    return {
        **call,
        "hidden_states": torch.cat([call["hidden_states"], tokens], 1),
        "img_ids": torch.cat([call["img_ids"], ids]),
    }


def sample(model, call):
    """A model's output as one tensor."""
    with torch.no_grad():
        found = model(**call).sample
        return torch.stack(found) if isinstance(found, list) else found


def family_against_one(kind, transform, **options):
    """Like ``flux_against_one``, for any family's model."""
    model, call = build(kind)
    dense = sample(model, call)
    flexclear.transform(model, backend="sdpa", **transform)
    whole = sample(model, call)
    shared = sample(parallel.enable(model, **options), call)
    flexclear.restore(model)
    return {
        "error": (shared - whole).abs().max().item(),
        "window": (dense - whole).abs().max().item(),
        "after": (sample(model, call) - dense).abs().max().item(),
    }


def switched(**override):
    """FLUX under a per-call switch."""
    model, call = build("flux")
    flexclear.transform(model, r=3, backend="sdpa")
    plain = run(model, call)
    with flexclear.override(**override):
        whole = run(model, call)
        shared = run(parallel.enable(model), call)
    return {"error": (shared - whole).abs().max().item(), "switch": (plain - whole).abs().max().item()}


def lora_and_another_transform():
    """A LoRA that is loaded after ``enable``, and another radius."""
    from peft import LoraConfig

    model, call = build("flux")
    whole = copy.deepcopy(flexclear.transform(model, r=3, backend="sdpa"))
    parallel.enable(model)
    for each in (whole, model):
        torch.manual_seed(1)
        each.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    before = run(copy_without_lora(), call)
    with_lora = (run(model, call) - run(whole, call)).abs().max().item()
    for each in (whole, model):
        flexclear.transform(each, r=5, backend="sdpa")
    wider = (run(model, call) - run(whole, call)).abs().max().item()
    return {"lora": with_lora, "wider": wider, "matters": (run(whole, call) - before).abs().max().item()}


def copy_without_lora():
    return flexclear.transform(build("flux")[0], r=3, backend="sdpa")


def compiled(kind):
    """A shared model whose blocks are compiled: its error, and what calls with other inputs recompile."""
    from torch._dynamo.utils import counters

    if kind == "flux":
        model = tiny_flux(num_layers=1, num_single_layers=1)
        calls = [flux_call(16, 16, 12, seed=seed) for seed in (0, 1)]
    else:
        model = models.tiny_zimage(n_layers=1)
        calls = [models.zimage_call(17, 13, (33, 7), seed=seed) for seed in (0, 1)]
    flexclear.transform(model, r=3, backend="sdpa")
    whole = [sample(model, call) for call in calls]
    parallel.enable(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    shared = [sample(model, calls[0])]
    graphs = counters["stats"]["unique_graphs"]
    shared.append(sample(model, calls[1]))
    errors = [(ours - expected).abs().max().item() for ours, expected in zip(shared, whole, strict=True)]
    return {"error": max(errors), "graphs": graphs, "new": counters["stats"]["unique_graphs"] - graphs}


def quantized():
    """Eight-bit weights."""
    from flexclear.compile import quantize

    model, call = build("flux")
    plain = run(flexclear.transform(model, r=3, backend="sdpa"), call)
    quantize(model, "weight_only", min_features=16)
    whole = run(model, call)
    shared = run(parallel.enable(model), call)
    return {"error": (shared - whole).abs().max().item(), "bits": (plain - whole).abs().max().item()}


def tensor_parallel(kind, transform_first):
    """A model whose heads diffusers distributes, as ``enable_parallelism`` does on GPUs; only its list of devices prevents it
    from doing so on CPUs."""
    from diffusers import TensorParallelConfig
    from diffusers.hooks import tensor_parallel as module
    from torch.distributed.device_mesh import init_device_mesh

    model, call = build(kind)
    dense = sample(model, call)
    whole = sample(flexclear.transform(model, r=3, backend="sdpa"), call)
    if not transform_first:
        flexclear.restore(model)
    mesh, config = init_device_mesh("cpu", (2,)), TensorParallelConfig(tp_degree=2)
    config.setup(mesh.get_rank(), 2, torch.device("cpu"), mesh)
    known = module._SUPPORTED_TP_DEVICES
    module._SUPPORTED_TP_DEVICES = (*known, "cpu")
    try:
        module.apply_tensor_parallel(model, config, model._tp_plan)
    finally:
        module._SUPPORTED_TP_DEVICES = known
    if not transform_first:
        flexclear.transform(model, r=3, backend="sdpa")
    return {"error": (sample(model, call) - whole).abs().max().item(), "window": (dense - whole).abs().max().item()}
