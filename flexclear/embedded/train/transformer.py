"""Train the transformer and both text encoders together, by flow matching on cached latents."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from flexclear.common.stopping import StopFlag
from flexclear.embedded.train.batches import Batch, BatchMaker
from flexclear.embedded.train.checkpoint import load_checkpoint, save_checkpoint
from flexclear.embedded.train.loop import Intervals, run_steps
from flexclear.embedded.train.optimizer import SplitOptimizer
from flexclear.embedded.train.schedule import Schedule, decide_end
from flexclear.embedded.train.sheets import save_sheet

CHECKPOINT_NAME = "transformer.pt"
LOG_EVERY = 50


@dataclass(frozen=True)
class TransformerRecipe:
    """Settings of the joint training.

    From step ``guided_from`` on, the model learns to work without classifier-free guidance; see :func:`flow_loss`.
    """

    matrix_rate: float = 7e-3
    other_rate: float = 1.5e-3
    warmup: int = 40
    save_every: int = 200
    sheet_every: int = 400
    compiled: bool = True
    half_precision: bool = True
    seed: int = 7
    guidance: float = 0.4
    guided_from: int | None = None

    def guidance_at(self, step: int) -> float:
        """Return how far a step's target is pushed away from the prediction for the empty caption."""
        return 0.0 if self.guided_from is None or step < self.guided_from else self.guidance


@dataclass(frozen=True)
class Learners:
    """The three models that are trained together."""

    transformer: FluxTransformer2DModel
    clip: CLIPTextModel
    t5: T5EncoderModel

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the three models' weights by name."""
        return {
            "transformer": self.transformer.state_dict(),
            "clip": self.clip.state_dict(),
            "t5": self.t5.state_dict(),
        }

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.transformer.load_state_dict(state["transformer"])
        self.clip.load_state_dict(state["clip"])
        self.t5.load_state_dict(state["t5"])


def flow_loss(learners: Learners, batch: Batch, half_precision: bool, guidance: float = 0.0) -> torch.Tensor:
    """Return the mean squared error of the predicted velocity, noise minus latents, as a scalar.

    With ``guidance`` g between 0 and 1 the target is pushed along the model's own difference between the caption and the empty
    caption, g (v(caption) - v("")), without gradients. Once that is learned, one call predicts what classifier-free guidance of
    scale 1 / (1 - g) would predict ("model guidance", arXiv 2502.12154).
    """
    pictures, channels, height, width = batch.latents.shape
    sigmas = batch.sigmas.view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * batch.latents + sigmas * batch.noise
    target = batch.noise - batch.latents

    def pack(latents: torch.Tensor) -> torch.Tensor:
        return FluxPipeline._pack_latents(latents, pictures, channels, height, width)

    image_ids = FluxPipeline._prepare_latent_image_ids(
        pictures, height // 2, width // 2, torch.device("cpu"), torch.float32
    )

    def predict(clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> torch.Tensor:
        pooled = learners.clip(clip_ids).pooler_output
        text = learners.t5(t5_ids)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half_precision):
            predicted = learners.transformer(
                hidden_states=pack(noisy),
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=batch.sigmas,
                img_ids=image_ids,
                txt_ids=torch.zeros(text.shape[1], 3),
                return_dict=False,
            )[0]
        return predicted.float()

    predicted = predict(batch.clip_ids, batch.t5_ids)
    wanted = pack(target)
    if guidance:
        with torch.no_grad():
            wanted = wanted + guidance * (predicted - predict(batch.empty_clip_ids, batch.empty_t5_ids))
    return F.mse_loss(predicted, wanted)


def train_transformer(
    recipe: TransformerRecipe,
    learners: Learners,
    maker: BatchMaker,
    pipeline: FluxPipeline,
    sheet_prompts: list[str],
    folder: Path,
    total: int | None,
    decay_from: int | None,
) -> int:
    """Train, or resume from ``folder/transformer.pt``, and return the number of steps done so far.

    Without ``total`` the learning rate stays flat and training runs until SIGTERM or SIGINT, which first save a checkpoint. A
    later call with ``total`` resumes there and decays the rate to zero.
    """
    optimizer = SplitOptimizer(
        learners.transformer, [learners.clip, learners.t5], recipe.matrix_rate, recipe.other_rate
    )
    path = folder / CHECKPOINT_NAME
    done = 0
    begun: Schedule | None = None
    if path.is_file():
        state = load_checkpoint(path)
        learners.load_state_dict(state["learners"])
        if state["optimizer"] is not None:  # None in a run that starts from exported weights.
            optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
        kept = state["schedule"]
        if kept is not None and kept["total"] is not None and total in (None, kept["total"]):
            begun = Schedule(**kept)
    schedule = begun or decide_end(recipe.warmup, done, total, decay_from)
    if recipe.compiled:
        torch._dynamo.config.recompile_limit = 64
        for block in [
            *learners.transformer.transformer_blocks,
            *learners.transformer.single_transformer_blocks,
        ]:
            block.compile(dynamic=False)

    def train(step: int, factor: float) -> float:
        loss = flow_loss(learners, maker.make(step), recipe.half_precision, recipe.guidance_at(step))
        loss.backward()
        optimizer.step(factor)
        return loss.item()

    def save(step: int) -> None:
        state = {
            "learners": learners.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "schedule": asdict(schedule),
            "shift": pipeline.vae.config.shift_factor,
            "scaling": pipeline.vae.config.scaling_factor,
        }
        save_checkpoint(path, state)

    def draw(step: int) -> None:
        save_sheet(sample(pipeline, sheet_prompts, steps=12), 8, folder / "sheets" / f"step{step:05d}.png")

    every = Intervals(LOG_EVERY, recipe.save_every, recipe.sheet_every)
    with StopFlag() as stop:
        return run_steps("transformer", folder, schedule, done, every, train, save, draw, stop)


def sample(pipeline: FluxPipeline, prompts: list[str], steps: int, pixels: int = 128) -> torch.Tensor:
    """Return images of the prompts, shape (prompts, 3, pixels, pixels), values -1 to 1, uncompiled."""
    generator = torch.Generator().manual_seed(0)
    with torch.compiler.set_stance("force_eager"):
        pictures = pipeline(
            prompts,
            height=pixels,
            width=pixels,
            num_inference_steps=steps,
            max_sequence_length=32,
            generator=generator,
            output_type="pt",
        ).images
    return pictures * 2 - 1
