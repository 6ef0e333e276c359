"""Functions for the processes of ``parallel_group.Group``: whole pipelines, and the command line."""

from __future__ import annotations

import torch
import torch.distributed as dist

import flexclear
from flexclear import parallel

from helpers.parallel_cases import run
from helpers.parallel_families import family

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
    """Compare images of a shared pipeline with those of one that is not shared."""
    pipe = pipeline(kind)
    flexclear.transform(pipe, backend="sdpa", **transform)
    whole = draw(pipe, **call)
    shared = draw(parallel.enable(pipe, **options), **call)
    parallel.disable(pipe)
    return {"error": (shared - whole).abs().max().item(), "after": (draw(pipe, **call) - whole).abs().max().item()}


def tiled_decoding():
    """An image whose VAE decodes tiles, shared and not."""
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
    """Compare images of two stages of ``upscale_cascade`` on a shared pipeline with those of one that is not shared."""
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
    from helpers.models import raster_ids

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
    """PSNR of a stale image against the synchronous one, with guidance: two calls of the model per step."""
    from flexclear.embedded.evaluation import picture_psnr

    pipe = flexclear.transform(pipeline(), r=4, backend="sdpa")
    guided = {"true_cfg_scale": 2.0, "negative_prompt": "a green field", "steps": steps}
    sync = draw(parallel.enable(pipe), **guided)
    parallel.enable(pipe, exchange="stale", warmup_steps=warmup_steps)
    stale, again = draw(pipe, **guided), draw(pipe, **guided)
    parallel.disable(pipe)
    return {"psnr": picture_psnr(stale, sync).item(), "again": (stale - again).abs().max().item()}


def stale_where_guidance_ends():
    """Z-Image, whose guidance ends after some steps, so that the batch shrinks: stale, stale again and sync."""
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
