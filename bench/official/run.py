"""The released code beside this one: attention, pooling, losses, optimizer, schedule and data on tiny models.

Run ``python -m bench.official.run CHECKOUT`` with a checkout of github.com/Huage001/CLEAR; it writes ``official.json`` and
``official.md`` into ``bench/results``. What is adapted to run the checkout: ``checkout.py``.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import json
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from PIL import Image

import flexclear
from flexclear.distill import DistillConfig
from flexclear.distill.batches import Batch
from flexclear.distill.losses import Objective
from flexclear.distill.optimizers import make_optimizer
from flexclear.distill.sources import find_items
from flexclear.distill.students import trained_parameters
from flexclear.highres.stages import RELEASED
from flexclear.highres.state import shifted
from flexclear.images.fitting import fitted
from flexclear.runtime.carrying import plan_here

from bench.machine import RESULTS, facts, write_results
from bench.official.checkout import Checkout, PipelineOf031

SIDE = 8
"""Tokens per side of the tiny images: 128 px."""
SCHEDULER = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""Of FLUX.1-dev."""


def row(part: str, name: str, theirs: Any, ours: Any) -> dict[str, Any]:
    """One line: numbers with their difference, tensors by the largest one, anything else by whether it is equal."""
    line = {"part": part, "name": name}
    if isinstance(theirs, torch.Tensor):
        difference = (theirs.double() - ours.double()).abs().max().item()
        sizes = {"theirs": f"up to {theirs.abs().max():.4g}", "ours": f"up to {ours.abs().max():.4g}"}
        return {**line, **sizes, "difference": f"{difference:.1e}"}
    if isinstance(theirs, float) and isinstance(ours, float) and theirs != ours:
        return {**line, "theirs": f"{theirs:.7g}", "ours": f"{ours:.7g}", "difference": f"{abs(theirs - ours):.1e}"}
    return {
        **line,
        "theirs": str(theirs),
        "ours": str(ours),
        "difference": "none" if theirs == ours else "**different**",
    }


def tiny(double: int = 3, single: int = 6, **changed: Any) -> FluxTransformer2DModel:
    """A FLUX with random weights whose head dimension and axes are FLUX.1's."""
    torch.manual_seed(0)
    sizes = {
        "in_channels": 16, "num_layers": double, "num_single_layers": single, "attention_head_dim": 128,
        "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True,
    }  # fmt: skip
    return FluxTransformer2DModel(**{**sizes, **changed}).eval()


def attention(code: Checkout) -> list[dict[str, Any]]:
    """Whole models with either attention, with and without pooled keys and the scale of high resolution."""
    theirs, rows = code.attention(), []
    text = 512  # which the pooling of the released code counts on
    generator = torch.Generator().manual_seed(1)
    call = {
        "hidden_states": torch.randn(1, SIDE * SIDE, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, text, 24, generator=generator),
        "pooled_projections": torch.randn(1, 20, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": diffusers.FluxPipeline._prepare_latent_image_ids(1, SIDE, SIDE, "cpu", torch.float32),
        "txt_ids": torch.zeros(text, 3),
    }
    for factor in (None, 4):
        stock, own = tiny(1, 1), tiny(1, 1)
        flexclear.transform(own, r=3, down_factor=factor, backend="sdpa")
        if factor is None:
            theirs.init_local_mask_flex(SIDE, SIDE, text_length=text, window_size=3, device="cpu")
            made = {name: theirs.LocalFlexAttnProcessor() for name in stock.attn_processors}
        else:
            theirs.init_local_downsample_mask_flex(
                SIDE, SIDE, text_length=text, window_size=3, down_factor=factor, device="cpu"
            )
            made = {name: theirs.LocalDownsampleFlexAttnProcessor(down_factor=factor) for name in stock.attn_processors}
        stock.set_attn_processor(made)
        if factor is not None:
            weights = {n: p for n, p in stock.named_parameters() if n.endswith("spatial_weight")}
            with torch.no_grad():
                for parameter in weights.values():
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) / 8)
            own.load_state_dict(weights, strict=False)
        kind = "r = 3" if factor is None else f"r = 3, keys pooled {factor} x {factor} with random weights"
        for proportional in (False, True):
            with torch.no_grad(), flexclear.override(proportional_attention=proportional):
                given = {"joint_attention_kwargs": {"proportional_attention": True}} if proportional else {}
                pair = stock(**call, **given).sample, own(**call).sample
            rows.append(row("attention", f"model output, {kind}" + ", proportional attention" * proportional, *pair))
    embedder = code.module("transformer_flux").FluxPosEmbed(theta=10_000, axes_dim=[16, 56, 56])
    ids = torch.cat([call["txt_ids"], call["img_ids"]])
    found: list[Any] = []
    own = flexclear.transform(tiny(1, 1), r=3, backend="sdpa", order="raster")
    handle = own.transformer_blocks[0].attn.register_forward_pre_hook(
        lambda module, args: found.append([table[0, :, 0] for table in plan_here().rotary])
    )
    with torch.no_grad(), flexclear.override(ntk_factor=10.0):
        own(**call)
    handle.remove()
    for name, a, b in zip(("cosines", "sines"), embedder(ids, ntk_factor=10), found[0], strict=True):
        rows.append(row("positions", f"{name} of RoPE, NTK factor 10", a, b))
    return rows


class NoVae:
    """In place of what cached latents do without."""

    requires_grad_ = to = lambda self, *args, **kwargs: self


def losses(code: Checkout) -> list[dict[str, Any]]:
    """One step of the released training loop up to its loss, and ours on the batch that it has drawn."""
    theirs = code.attention()
    options = code.arguments("--resolution=128", "--window_size=3", "--max_sequence_length=16")
    teacher = tiny()
    student = copy.deepcopy(teacher)
    with torch.no_grad():  # a student that has trained, or L_pred and L_attn would see the windows only
        for name, parameter in student.named_parameters():
            if ".attn.to_" in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    own, reference = copy.deepcopy(student), copy.deepcopy(teacher)
    names: dict[str, Any] = {
        "args": options, "torch": torch, "transformer": student, "transformer_teacher": teacher,
        "accelerator": types.SimpleNamespace(device=torch.device("cpu")), "weight_dtype": torch.float32,
        "noise_scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER), "FluxPipeline": PipelineOf031,
        "compute_density_for_timestep_sampling": compute_density_for_timestep_sampling,
        "compute_loss_weighting_for_sd3": compute_loss_weighting_for_sd3,
        "vae_config_shift_factor": 0.1159, "vae_config_scaling_factor": 0.3611,
        "vae_config_block_out_channels": (1, 1, 1, 1), "guidance_embeds": True,
        **{name: getattr(theirs, name) for name in vars(theirs) if not name.startswith("_")},
    }  # fmt: skip
    code.function("get_sigmas", names)
    code.run("if args.down_factor == 1", "transformer_teacher.set_attn_processor", names)
    torch.manual_seed(3)
    names["batch"] = {
        "prompt_embeds_t5": torch.randn(2, 16, 24),
        "prompt_embeds_clip": torch.randn(2, 20),
        "latent_codes_mean": torch.randn(2, 4, 2 * SIDE, 2 * SIDE),
        "latent_codes_std": torch.rand(2, 4, 2 * SIDE, 2 * SIDE),
    }
    with torch.no_grad():
        code.run("if not args.use_cached_prompt_embed", "loss = loss_fm", names)
    sigmas, given = names["sigmas"].flatten(), names["batch"]
    batch = Batch(names["model_input"], names["noise"], sigmas, given["prompt_embeds_t5"], given["prompt_embeds_clip"])
    config = DistillConfig(output=Path("unused"))
    flexclear.transform(own, r=3, backend="sdpa")
    with torch.no_grad():
        ours = Objective(own, reference.requires_grad_(False), config.losses, config.guidance)(batch)
    drawn = given["latent_codes_mean"] + given["latent_codes_std"] * names["sample"]
    rows = [
        row("losses", name, names[variable].item(), value.item())
        for name, variable, value in (
            ("L_flow", "loss_fm", ours.flow), ("L_pred", "loss_distill", ours.prediction),
            ("L_attn", "loss_attn", ours.attention), ("weighted sum", "loss", ours.total),
        )
    ]  # fmt: skip
    rows.append(row("losses", "latents of the moments", names["model_input"], (drawn - 0.1159) * 0.3611))
    fresh = tiny()
    keep = ("to_q", "to_k", "to_v", "to_out")
    picked = sorted(n for n, _ in fresh.named_parameters() if any(f".attn.{part}." in n for part in keep))
    trained = sorted(trained_parameters(flexclear.transform(fresh, r=3, backend="sdpa")))
    return [
        *rows,
        row("training", f"names of the {len(picked)} trained parameters", picked == picked, picked == trained),
    ]


def training(code: Checkout) -> list[dict[str, Any]]:
    """What the released script is started with, the optimizers that it makes, and its noise levels."""
    options, config = code.arguments(), DistillConfig(output=Path("unused"))
    rows = [
        row("training", name, theirs, ours)
        for name, theirs, ours in (
            ("optimizer", options.optimizer, config.optimizer.name),
            ("schedule", options.lr_scheduler, config.optimizer.schedule),
            ("warm-up steps", options.lr_warmup_steps, config.optimizer.warmup_steps),
            ("images per device", options.train_batch_size, config.batch_size),
            ("window radius", options.window_size, config.radius),
            ("guidance", options.guidance_scale, config.guidance),
            ("gradient clipping", options.max_grad_norm, config.max_grad_norm),
            ("steps (the paper's 10,000; the shell script's)", options.max_train_steps, config.steps),
            (
                "accumulated batches (ours: the machine's)",
                options.gradient_accumulation_steps,
                config.gradient_accumulation,
            ),
            ("precision (ours: the machine's)", options.mixed_precision, config.mixed_precision),
            (
                "gradient checkpointing (ours: the machine's)",
                options.gradient_checkpointing,
                config.gradient_checkpointing,
            ),
        )
    ]
    for name in ("prodigy", "adamw"):
        asked = code.arguments(f"--optimizer={name}", f"--learning_rate={1.0 if name == 'prodigy' else 1e-4}")
        parameter = torch.nn.Parameter(torch.ones(3))
        names: dict[str, Any] = {
            "args": asked,
            "torch": torch,
            "params_to_optimize": [{"params": [parameter], "lr": asked.learning_rate}],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            code.run("if args.optimizer.lower() == 'adamw'", "if args.optimizer.lower() == 'prodigy'", names)
        own = make_optimizer(type(config.optimizer)(name), [parameter])
        groups = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (names["optimizer"], own)]
        rows.append(row("optimizer", f"{name}: class", type(names["optimizer"]).__name__, type(own).__name__))
        rows += [row("optimizer", f"{name}: {key}", value, groups[1].get(key)) for key, value in groups[0].items()]
    u = compute_density_for_timestep_sampling("none", 4096, 0.0, 1.0, 1.29)
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    levels = scheduler.timesteps[(u * 1000).long()] / 1000
    told = f"uniform, {len(scheduler.timesteps)} levels from {scheduler.timesteps.min() / 1000:g} to 1"
    shift = config.timesteps.shift
    ours = shift * u / (1 + (shift - 1) * u)
    rows.append(
        row(
            "training",
            f"noise levels (means {levels.mean():.3f} and {ours.mean():.3f} of 4096)",
            told,
            f"{config.timesteps.sampling}, any from 0 to 1",
        )
    )
    return rows


def schedule(code: Checkout) -> list[dict[str, Any]]:
    """The notebook's assignments to its scheduler, and the arguments of its call."""
    statements = code.notebook()
    theirs = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    ours = shifted(FlowMatchEulerDiscreteScheduler(**SCHEDULER), RELEASED["sdedit"]["shift"])
    assigned = [
        s for s in statements if isinstance(s, ast.Assign) and ast.unparse(s).startswith("pipe.scheduler.config.")
    ]
    exec(
        compile(ast.Module(assigned, []), "inference_t2i_highres.ipynb", "exec"),
        {"pipe": types.SimpleNamespace(scheduler=theirs)},
    )
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=1.15)
    name = "sigmas after " + ", ".join(ast.unparse(s).removeprefix("pipe.scheduler.config.") for s in assigned)
    rows = [row("schedule", f"{name}; ours: shift {RELEASED['sdedit']['shift']:g}", theirs.sigmas, ours.sigmas)]
    (called,) = [s for s in statements if ast.unparse(s).startswith("image_hr = pipe(")]
    (call,) = [n for n in ast.walk(called) if isinstance(n, ast.Call) and ast.unparse(n.func) == "pipe"]
    keywords = {word.arg: word.value for word in call.keywords}
    names = {ast.unparse(s.targets[0]): s.value for s in statements if isinstance(s, ast.Assign)}
    for key, own in (
        ("num_inference_steps", "steps"), ("strength", "strength"), ("guidance_scale", "guidance"),
        ("ntk_factor", "ntk_factor"), ("proportional_attention", "proportional_attention"),
    ):  # fmt: skip
        node = keywords[key]
        value = ast.literal_eval(names[node.id] if isinstance(node, ast.Name) else node)
        rows.append(row("SDEdit", key, value, RELEASED["sdedit"][own]))
    return rows


def data(code: Checkout) -> list[dict[str, Any]]:
    """A folder in the published set's layout, read by both."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, side in enumerate(((64, 96), (64, 64), (80, 112))):
            pixels = np.random.default_rng(number).integers(0, 256, (*side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
            (folder / f"{number}.json").write_text(json.dumps({"prompt": f"image {number}"}))
        theirs = code.module("dataset").CustomImageDataset(str(folder), img_size=64)
        items, skipped = find_items(folder)
        rows.append(row("data", "items", len(theirs), len(items)))
        rows.append(row("data", "skipped", 0, len(skipped)))
        for number, item in enumerate(items):
            found = theirs[number]
            rows.append(row("data", f"prompt {number}", found["prompts"], item.caption))
            own = torch.from_numpy(np.array(fitted(item.picture(), None, 16)) / 127.5 - 1).permute(2, 0, 1)
            size = tuple(own.shape[1:])
            if own.shape == found["images"].shape:
                rows.append(row("data", f"pixels of {size[0]} x {size[1]}", found["images"], own))
            else:
                stretched = " x ".join(map(str, found["images"].shape[1:])) + " (stretched)"
                rows.append(row("data", "size of 80 x 112", stretched, f"{size[0]} x {size[1]} (cut)"))
    return rows


PARTS: tuple[Callable[[Checkout], list[dict[str, Any]]], ...] = (attention, losses, training, schedule, data)


def table(rows: list[dict[str, Any]]) -> str:
    """All of it in Markdown."""
    head = ["| part | compared | released code | flexclear | difference |", "|---|---|---|---|---|"]
    return "\n".join([*head, *("| " + " | ".join(line.values()) + " |" for line in rows)]) + "\n"


def main(
    checkout: Annotated[Path, typer.Argument(help="Folder of a checkout of github.com/Huage001/CLEAR.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Run both, print the differences, and write JSON and Markdown."""
    torch.set_num_threads(1)
    code = Checkout(checkout)
    rows = [line for part in PARTS for line in part(code)]
    about = facts(
        torch.device("cpu"),
        diffusers=diffusers.__version__,
        released=f"a checkout of github.com/Huage001/CLEAR at {code.commit()}",
    )
    write_results("official", about, rows, table(rows), out)
    typer.echo(table(rows))


if __name__ == "__main__":
    typer.run(main)
