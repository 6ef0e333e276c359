"""Train one ControlNet for the embedded model's three conditions, with flow matching through the frozen model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import FluxControlNetModel, FluxPipeline, FluxTransformer2DModel

from flexclear.common.foreign import from_pretrained
from flexclear.compile.files import whole_file
from flexclear.embedded.control import FACTS_NAME, MODES
from flexclear.embedded.train.checkpoint import load_checkpoint, save_checkpoint
from flexclear.embedded.train.controlnet_data import ControlBatch, ControlBatchMaker
from flexclear.embedded.train.controlnet_recipe import ControlRecipe
from flexclear.embedded.train.export import LICENCE_NAME, NOTICE
from flexclear.embedded.train.loop import Intervals, run_steps
from flexclear.embedded.train.optimizer import SplitOptimizer

if TYPE_CHECKING:
    from PIL import Image

CHECKPOINT_NAME = "controlnet.pt"
LOG_EVERY = 25
LARGEST_BYTES = 3_000_000
"""Maximum size of the ControlNet in the package."""


def build_controlnet(transformer: FluxTransformer2DModel, layers: int, single_layers: int) -> FluxControlNetModel:
    """Return a ControlNet initialized with the transformer's first blocks, and without effect yet.

    Conditions are images in the transformer's own latent space, so the ControlNet can read them from the start; only its
    outputs begin at zero.
    """
    heads, width = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    plain = FluxControlNetModel.from_transformer(transformer, layers, single_layers, width, heads)
    # Leave out entries of the transformer only, and diffusers' private ones, which would reset the modes.
    config = {
        name: value for name, value in plain.config.items() if name != "out_channels" and not name.startswith("_")
    }
    model = FluxControlNetModel.from_config({**config, "num_mode": len(MODES)})
    model.load_state_dict(plain.state_dict(), strict=False)  # All but the modes' embedding.
    model.controlnet_x_embedder.load_state_dict(transformer.x_embedder.state_dict())
    return model


def control_loss(
    pipeline: FluxPipeline, model: FluxControlNetModel, batch: ControlBatch, half_precision: bool
) -> torch.Tensor:
    """Return the mean squared error of the velocity that the pipeline's frozen transformer predicts with the ControlNet."""
    pictures, channels, height, width = batch.latents.shape
    sigmas = batch.sigmas.view(-1, 1, 1, 1)

    def pack(latents: torch.Tensor) -> torch.Tensor:
        return FluxPipeline._pack_latents(latents, pictures, channels, height, width)

    with torch.no_grad():
        pooled = pipeline.text_encoder(batch.clip_ids).pooler_output
        text = pipeline.text_encoder_2(batch.t5_ids)[0]
    common = {
        "hidden_states": pack((1 - sigmas) * batch.latents + sigmas * batch.noise),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": batch.sigmas,
        "img_ids": FluxPipeline._prepare_latent_image_ids(
            pictures, height // 2, width // 2, torch.device("cpu"), torch.float32
        ),
        "txt_ids": torch.zeros(text.shape[1], 3),
        "return_dict": False,
    }
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half_precision):
        double, single = model(controlnet_cond=pack(batch.conditions), controlnet_mode=batch.modes, **common)
        predicted = pipeline.transformer(
            controlnet_block_samples=double, controlnet_single_block_samples=single, **common
        )[0]
    return F.mse_loss(predicted.float(), pack(batch.noise - batch.latents))


def train_controlnet(
    recipe: ControlRecipe,
    pipeline: FluxPipeline,
    maker: ControlBatchMaker,
    folder: Path,
    teacher: str,
    stop: Callable[[], bool] = lambda: False,
    sheet: Callable[[FluxControlNetModel], Image.Image] | None = None,
    start: Path | None = None,
) -> tuple[FluxControlNetModel, int]:
    """Train, or resume from the checkpoint in ``folder``.

    Args:
        recipe: settings.
        pipeline: the embedded pipeline, float32; its models are frozen.
        maker: makes the batches.
        folder: for the checkpoint, ``controlnet.jsonl`` and ``sheets/``.
        teacher: fingerprint of the pipeline's weights.
        stop: called after each step; True ends the run with a checkpoint.
        sheet: draws a contact sheet.
        start: folder of a ControlNet with the same blocks to start from, for example one for an earlier model.

    Returns:
        The ControlNet in training precision, and the number of steps done so far.

    Raises:
        ValueError: the checkpoint has other settings or another teacher.
    """
    torch.manual_seed(recipe.seed)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
        part.requires_grad_(False).eval()
    model = build_controlnet(pipeline.transformer, recipe.layers, recipe.single_layers).train()
    if start is not None:
        model.load_state_dict(from_pretrained(FluxControlNetModel, start, torch.float32).state_dict())
    optimizer = SplitOptimizer(model, [], recipe.matrix_rate, recipe.other_rate)
    schedule, done, path = recipe.schedule(), 0, folder / CHECKPOINT_NAME
    identity = {"recipe": {k: v for k, v in vars(recipe).items() if not k.endswith("_every")}, "teacher": teacher}
    if path.is_file():
        state = load_checkpoint(path)
        if state["identity"] != identity:
            raise ValueError(
                f"{path} is from another run: {_differences(state['identity'], identity)}. Name another folder, or delete it"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    if recipe.compiled:
        torch._dynamo.config.recompile_limit = 64
        for net in (model, pipeline.transformer):
            for block in (*net.transformer_blocks, *net.single_transformer_blocks):
                block.compile(dynamic=False)

    def train(step: int, factor: float) -> float:
        loss = control_loss(pipeline, model, maker.make(step), recipe.half_precision)
        loss.backward()
        optimizer.step(factor)
        return loss.item()

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(path, {**state, "step": step, "identity": identity})

    def draw(step: int) -> None:
        if sheet is None:
            return
        file = folder / "sheets" / f"controlnet{step:05d}.png"
        with torch.compiler.set_stance("force_eager"), whole_file(file) as beside:
            sheet(model.eval()).save(beside, format="PNG")
        model.train()

    every = Intervals(LOG_EVERY, recipe.save_every, recipe.sheet_every)
    done = run_steps("controlnet", folder, schedule, done, every, train, save, draw, stop)
    return model.eval(), done


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    pairs = {"teacher": (theirs["teacher"], ours["teacher"])}
    pairs |= {name: (theirs["recipe"].get(name), value) for name, value in ours["recipe"].items()}
    return ", ".join(f"{name} {old} there, {new} here" for name, (old, new) in pairs.items() if old != new)


def export_controlnet(model: FluxControlNetModel, target: Path, facts: dict[str, Any]) -> Path:
    """Write a trained ControlNet as a diffusers folder in bfloat16. It replaces an old one only when complete.

    Args:
        model: the ControlNet, which is not changed.
        target: the folder.
        facts: contents of ``training.json``, including ``teacher``.

    Returns:
        The folder.

    Raises:
        ValueError: the weights are larger than ``LARGEST_BYTES``; then nothing is written.
    """
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    shipped = FluxControlNetModel.from_config(config).to(torch.bfloat16)
    shipped.load_state_dict(model.state_dict())
    size = sum(parameter.numel() * 2 for parameter in shipped.parameters())
    if size > LARGEST_BYTES:
        raise ValueError(f"the ControlNet takes {size} bytes, at most {LARGEST_BYTES} ship: use fewer blocks")
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    shipped.save_pretrained(partial, safe_serialization=True)
    (partial / FACTS_NAME).write_text(json.dumps({"modes": MODES, **facts}, indent=1) + "\n", encoding="utf-8")
    notice = NOTICE.replace(", and\nemoji.png holds small drawings of some of its glyphs", "")
    (partial / "NOTICE.txt").write_text(notice, encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name(LICENCE_NAME), partial / LICENCE_NAME)
    for path in (partial, *partial.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return target
