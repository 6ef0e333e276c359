"""What the processes of ``parallel_group.Group`` run. Every function is called on every rank."""

from __future__ import annotations

import copy
import itertools
import warnings

import diffusers  # noqa: F401
import torch
import torch.distributed as dist

import flexclear
from flexclear import parallel
from flexclear.families import flux_attention, sd3_attention  # noqa: F401
from flexclear.parallel.group import ranks_of

from models import flux_call, tiny_flux

warnings.filterwarnings("ignore", message="flexclear: ")


def awake():
    """So that the bars of a pipeline are quiet, and to know that a process is there."""
    ranks_of(None)
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


def dense_against_one(kind, height, width, text_len, batch=1):
    """Greatest difference of a dense FLUX that diffusers shares to a whole one, and of a whole one afterwards."""

    def outcome(model, call):
        with torch.no_grad():
            return model(**call)[0]

    from diffusers import attention_backend

    model = tiny_flux()
    # As pipelines call it: diffusers splits and gathers tensors only.
    call = {**flux_call(height, width, text_len, batch), "return_dict": False}
    # set_attention_backend changes the default of the whole process too; leaving the context puts that back.
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
    """What is said of it, what is left in the model, and how far its output then is from what it was."""
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


# Families


def family(name):
    """The test module of a family, for its small model and calls."""
    import importlib

    return importlib.import_module(f"test_{name}")


def build(kind):
    """A small model and a call of it."""
    batch = {"batch": 2}
    if kind == "flux":
        return tiny_flux(), flux_call(16, 20, 12, 2)
    if kind == "flux with references":
        return tiny_flux(), with_reference(flux_call(16, 20, 12, 1), 26, 11)
    if kind == "flux with residuals":
        call = flux_call(20, 16, 12)
        call["controlnet_block_samples"] = [torch.randn(1, 320, 32, generator=torch.Generator().manual_seed(9))]
        return tiny_flux(), call
    if kind == "flux2":
        cases = family("flux2")
        return cases.tiny_flux2(), cases.flux2_call((16, 9), ((24, 8), (7, 12)), 10, 2)
    if kind == "sd3":
        cases = family("sd3")
        return cases.tiny_sd3(), cases.sd3_call(16, 11, 12, 2)
    if kind == "sd3.5 with residuals":
        cases = family("sd3")
        call = cases.sd3_call(11, 18, 12)
        call["block_controlnet_hidden_states"] = [
            torch.randn(1, 11 * 18, 32, generator=torch.Generator().manual_seed(9))
        ]
        return cases.tiny_sd3(**cases.SD35), call
    if kind.startswith("chroma"):
        cases = family("chroma")
        return cases.tiny_chroma(), cases.chroma_call(16, 13, 12, **batch, kind=kind.removeprefix("chroma, "))
    if kind.startswith("zimage"):
        return build_zimage(kind.removeprefix("zimage, "))
    cases = family("qwen")
    mask = torch.ones(2, 12)
    mask[1, 7:] = 0
    return cases.tiny_qwen(), cases.qwen_call((16, 10), ((9, 14),), 12, 2, mask=mask)


def build_zimage(kind):
    """Sizes with and without pads, of which a rank's own picture has other numbers than the whole one."""
    cases = family("zimage")
    (height, width), captions, config = {
        "no pads": ((16, 16), (20,), {}),
        "pads, two captions": ((25, 9), (33, 7), {}),
        "pads, columns": ((9, 29), (7, 40), {}),
        "no refiner": ((19, 13), (33, 7), {"n_refiner_layers": 0}),
        "as large as positions go": ((64, 5), (33, 7), {"axes_lens": [200, 64, 5]}),
        "residuals": ((17, 16), (33, 7), {}),
    }[kind]
    call = cases.call_of(height, width, captions)
    if kind == "residuals":
        length = cases.padded(height * width) + 64
        call["controlnet_block_samples"] = {0: torch.randn(2, length, 32, generator=torch.Generator().manual_seed(9))}
    return cases.tiny_zimage(**config), call


def with_reference(call, height, width):
    """A FLUX call with the tokens of a reference picture behind its own."""
    from models import raster_ids

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
    """As ``flux_against_one`` for any family's model."""
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


# Text


class PatchText:
    """Paper Eq. 7 by hand for a single-stream layer's queries, keys and values: every rank's text, then their average."""

    def __init__(self, layout, edges, r):
        y, x = layout.coordinates()
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
    with mock.patch("flexclear.call_plan.windowed_attention", lambda q, k, v, mask, scale=None: by_hand(q, k, v)):
        expected = run(model, call)
    flexclear.transform(model, r=r, backend="sdpa")
    shared = run(parallel.enable(model, text="average", **options), call)
    return {"error": (shared - expected).abs().max().item(), "exact": (exact - expected).abs().max().item()}


# Pipelines

_pipes = {}


def make_pipeline(kind):
    if kind == "embedded":
        return flexclear.embedded.pipeline()
    if kind == "sd3":
        return family("sd3").pipe.__wrapped__()
    cases = family("zimage")
    return cases.pipeline(cases.parts.__wrapped__(), "ZImagePipeline", cases.tiny_zimage(in_channels=8))


def pipeline(kind="embedded"):
    if kind not in _pipes:
        made = make_pipeline(kind)
        made.set_progress_bar_config(disable=True)
        _pipes[kind] = made
    return flexclear.restore(_pipes[kind])


def draw(pipe, height=128, width=128, steps=3, seed=3, prompt="a red apple on a blue background", **extra):
    return pipe(
        prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **extra,
    ).images


def pipeline_against_one(kind, transform, options, **call):
    """Pictures of a pipeline that is shared against those of one that is not."""
    pipe = pipeline(kind)
    flexclear.transform(pipe, backend="sdpa", **transform)
    whole = draw(pipe, **call)
    shared = draw(parallel.enable(pipe, **options), **call)
    parallel.disable(pipe)
    return {"error": (shared - whole).abs().max().item(), "after": (draw(pipe, **call) - whole).abs().max().item()}


def tiled_decoding():
    """A picture whose VAE decodes tiles, shared and not."""
    pipe = flexclear.transform(pipeline(), r=4, backend="sdpa")
    pipe.vae.enable_tiling()
    before = pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 64, 16
    whole = draw(pipe, steps=1)
    shared = draw(parallel.enable(pipe), steps=1)
    sent = parallel.sent_bytes(pipe).get("vae", 0)
    parallel.disable(pipe)
    own = "tiled_decode" in vars(pipe.vae)
    pipe.vae.disable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = before
    return {"error": (shared - whole).abs().max().item(), "sent": sent, "left": own}


def cascade(method, folder):
    """Pictures of two stages of ``upscale_cascade`` on a shared pipeline against those of one that is not shared."""
    import numpy as np

    from flexclear.highres import upscale_cascade

    pipe = flexclear.transform(pipeline(), r=4, backend="sdpa")

    def drawn(**more):
        done = upscale_cascade(
            pipe, "a red apple on a blue background", [(96, 64), (144, 96)], method=method, steps=2, seed=3, tile=64,
            max_sequence_length=16, **more,
        )  # fmt: skip
        return [np.asarray(picture).astype(int) for picture in done.images]

    whole = drawn()
    parallel.enable(pipe)
    shared = drawn()
    try:
        drawn(folder=folder)
    except ValueError as error:
        refused = str(error)
    sent = parallel.sent_bytes(pipe)
    parallel.disable(pipe)
    return {
        "differences": [abs(ours - theirs).max() for ours, theirs in zip(shared, whole, strict=True)],
        "stages": abs(whole[1][:96, :64] - whole[0]).max(),
        "sum": shared[1].sum(),
        "sent": sent,
        "refused": refused,
    }


def stale_with_the_same_input(steps=6, warmup_steps=2):
    """Outputs of every step of a shared model whose input never changes, sync and stale."""
    pipe = flexclear.transform(pipeline(), r=4, backend="sdpa")
    model, call = pipe.transformer, embedded_call(pipe)
    found = {}
    for exchange in ("sync", "stale"):
        parallel.enable(pipe, exchange=exchange, warmup_steps=warmup_steps)
        pipe.scheduler.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)], mu=0.5)
        outputs = []
        for timestep in pipe.scheduler.timesteps:
            outputs.append(run(model, call))
            pipe.scheduler.step(outputs[-1], timestep, outputs[-1])
        found[exchange] = torch.stack(outputs), parallel.sent_bytes(pipe)["border"]
        parallel.disable(pipe)
    (sync, sync_sent), (stale, stale_sent) = found["sync"], found["stale"]
    return {"error": (sync - stale).abs().max().item(), "saved": 1 - stale_sent / sync_sent}


def embedded_call(pipe, side=16, text_len=16):
    from models import raster_ids

    config = pipe.transformer.config
    generator = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, side * side, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, text_len, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "timestep": torch.full((1,), 0.5),
        "img_ids": raster_ids(side, side),
        "txt_ids": torch.zeros(text_len, 3),
    }
    return {**call, "guidance": torch.full((1,), 3.5)} if config.guidance_embeds else call


def stale_picture(steps=6, warmup_steps=2):
    """PSNR of a stale picture to the synchronous one, with guidance: two calls of the model a step."""
    from flexclear.embedded.evaluation import picture_psnr

    pipe = flexclear.transform(pipeline(), r=4, backend="sdpa")
    guided = {"true_cfg_scale": 2.0, "negative_prompt": "a green field", "steps": steps}
    sync = draw(parallel.enable(pipe), **guided)
    parallel.enable(pipe, exchange="stale", warmup_steps=warmup_steps)
    stale, again = draw(pipe, **guided), draw(pipe, **guided)
    parallel.disable(pipe)
    return {"psnr": picture_psnr(stale, sync).item(), "again": (stale - again).abs().max().item()}


def stale_where_guidance_ends():
    """Z-Image, which leaves guidance out after some steps, so that the batch shrinks: stale, stale again and sync."""
    pipe = flexclear.transform(pipeline("zimage"), r=4, backend="sdpa")
    batches = []

    def remember(module, args, kwargs):
        batches.append(len(args[0] if args else kwargs["x"]))  # flexclear's own hook, if it was first, leaves no args

    handle = pipe.transformer.register_forward_pre_hook(remember, with_kwargs=True)
    call = {"height": 136, "width": 72, "steps": 6, "cfg_truncation": 0.5}
    whole = draw(pipe, **call)
    found = {"batches": batches}
    for exchange in ("sync", "stale"):
        parallel.enable(pipe, exchange=exchange, warmup_steps=2)
        found[exchange] = (draw(pipe, **call) - whole).abs().max().item()
    found["again"] = (draw(pipe, **call) - whole).abs().max().item()
    parallel.disable(pipe)
    handle.remove()
    return found


def two_pictures_at_once(r=4):
    """Four ranks as two groups of two, each with a picture of its own."""
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


# Compiled and quantised models, and the command


def compiled(kind):
    """A model whose blocks are compiled, shared: its error, and what calls with other inputs compile anew."""
    from torch._dynamo.utils import counters

    if kind == "flux":
        model = tiny_flux(num_layers=1, num_single_layers=1)
        calls = [flux_call(16, 16, 12, seed=seed) for seed in (0, 1)]
    else:
        cases = family("zimage")
        model = cases.tiny_zimage(n_layers=1)
        calls = [cases.call_of(17, 13, (33, 7), seed=seed) for seed in (0, 1)]
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


def command(*arguments):
    """The command line in this process, as torchrun starts it: exit status and standard output."""
    import contextlib
    import io

    from flexclear import cli

    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            cli.main(list(arguments))
        except SystemExit as end:
            return end.code or 0, out.getvalue(), error.getvalue(), dist.is_initialized()
    raise AssertionError("the command did not end")
