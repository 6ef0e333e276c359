"""The models that bench/pipeline/run.py times: published configurations with random weights, and what a pipeline feeds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import flexclear
from flexclear.measuring.models import with_random_weights
from flexclear.measuring.names import SD35_LARGE

FLUX_SCHEDULER = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


@dataclass(frozen=True)
class Model:
    """A model to time.

    Attributes:
        name: what ``--model`` calls it.
        kind: ``"flux"`` or ``"sd3"``.
        config: arguments of its diffusers class; None: those of the embedded model.
        text_len: text tokens.
        px_per_token: pixels per token and side.
        batch: sequences per step: 2 where the pipeline guides by a negative prompt.
        sizes: sides in pixels that are timed unless told otherwise.
        radii: the same of window radii in tokens.
        scheduler: arguments of ``FlowMatchEulerDiscreteScheduler``.
    """

    name: str
    kind: str
    config: dict[str, Any] | None
    text_len: int = 512
    px_per_token: int = 16
    batch: int = 1
    sizes: tuple[int, ...] = (1024, 2048, 4096, 8192)
    radii: tuple[int, ...] = (8, 16, 32)
    scheduler: dict[str, Any] = field(default_factory=lambda: FLUX_SCHEDULER)


_TINY = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}
_TINY_SD3 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 14,
}

MODELS = {
    model.name: model
    for model in (
        Model("flux.1-dev", "flux", {"guidance_embeds": True}),
        Model("flux.1-schnell", "flux", {"guidance_embeds": False}, text_len=256, scheduler={"shift": 1.0}),
        Model("sd3.5-large", "sd3", SD35_LARGE, text_len=333, batch=2, scheduler={"shift": 3.0}),
        Model("embedded", "flux", None, text_len=32, px_per_token=8, sizes=(128, 256, 512), radii=(4, 8)),
        Model(
            "flux-reduced",
            "flux",
            {"guidance_embeds": True, "num_layers": 2, "num_single_layers": 4, "num_attention_heads": 2},
            sizes=(1024,),
            radii=(8, 16),
        ),
        # For tests; the second has no positions beyond 14 x 14 tokens.
        Model("tiny", "flux", _TINY, text_len=7, sizes=(192, 256), radii=(3, 4)),
        Model(
            "tiny-sd3",
            "sd3",
            {**SD35_LARGE, **_TINY_SD3},
            text_len=7,
            batch=2,
            sizes=(192, 256),
            radii=(3,),
            scheduler={"shift": 3.0},
        ),
    )
}


def skeleton(model: Model, dtype: torch.dtype) -> Any:
    """The transformer without weights, on the meta device."""
    import diffusers

    made = {"flux": diffusers.FluxTransformer2DModel, "sd3": diffusers.SD3Transformer2DModel}[model.kind]
    config = model.config or made.load_config(flexclear.embedded.model_directory() / "transformer")
    with torch.device("meta"):
        # Not diffusers' own .to, which speaks of modules that are to stay in float32, where there are none.
        return nn.Module.to(made.from_config(config), dtype)


def build(model: Model, device: torch.device, dtype: torch.dtype, trained: bool = False, seed: int = 0) -> nn.Module:
    """The transformer on ``device`` in ``dtype``, in eval mode; random weights never exist in another type or place.

    Raises:
        ValueError: trained weights of a model that does not come with any.
    """
    if trained:
        if model.config is not None:
            raise ValueError(
                f"--weights trained: only the embedded model comes with weights; {model.name} has random ones"
            )
        return flexclear.embedded.pipeline(dtype, device).transformer.eval().requires_grad_(False)
    return with_random_weights(skeleton(model, dtype).eval().requires_grad_(False), device, seed)


class Job:
    """One picture's denoising loop, without text encoders and VAE: latents, position ids and the scheduler as the
    pipeline makes them, text embeddings made up.

    Args:
        model: which.
        transformer: its transformer; the loop is given its configuration.
        height, width: in pixels.
        steps: denoising steps of the schedule.
        device, dtype: of the latents.
        seed: of noise and text.
    """

    def __init__(
        self,
        model: Model,
        transformer: Any,
        height: int,
        width: int,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        self.model = model
        config = transformer.config
        self.grid = height // model.px_per_token, width // model.px_per_token
        generator = torch.Generator(device).manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.kwargs: dict[str, Any] = {
            "encoder_hidden_states": noise(model.batch, model.text_len, config.joint_attention_dim),
            "pooled_projections": noise(model.batch, config.pooled_projection_dim),
            "return_dict": False,
        }
        rows, columns = self.grid
        if model.kind == "sd3":
            self.latents = noise(1, config.in_channels, rows * config.patch_size, columns * config.patch_size)
        else:
            from diffusers import FluxPipeline

            spread = noise(1, config.in_channels // 4, 2 * rows, 2 * columns)
            self.latents = FluxPipeline._pack_latents(spread, 1, config.in_channels // 4, 2 * rows, 2 * columns)
            self.kwargs["img_ids"] = FluxPipeline._prepare_latent_image_ids(1, rows, columns, device, dtype)
            self.kwargs["txt_ids"] = torch.zeros(model.text_len, 3, device=device, dtype=dtype)
            if config.guidance_embeds:
                self.kwargs["guidance"] = torch.full((1,), 3.5, device=device, dtype=torch.float32)
        self._schedule(steps, device)

    def _schedule(self, steps: int, device: torch.device) -> None:
        import numpy as np
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        self.scheduler = FlowMatchEulerDiscreteScheduler(**self.model.scheduler)
        sigmas = np.linspace(1.0, 1 / steps, steps)
        shifting = self.scheduler.config.use_dynamic_shifting
        mu = calculate_shift(self.grid[0] * self.grid[1]) if shifting else None
        self.scheduler.set_timesteps(sigmas=sigmas, device=device, mu=mu)
        self.scheduler.set_begin_index(0)

    def predict(self, transformer: Any, timestep: Tensor, latents: Tensor | None = None) -> Tensor:
        """The transformer's output of one step, guidance applied."""
        latents = self.latents if latents is None else latents
        sd3 = self.model.kind == "sd3"
        batched = latents.expand(self.model.batch, *latents.shape[1:])
        timesteps = timestep.expand(self.model.batch).to(latents.dtype)
        out = transformer(hidden_states=batched, timestep=timesteps if sd3 else timesteps / 1000, **self.kwargs)[0]
        if self.model.batch == 1:
            return out
        negative, positive = out.chunk(2)
        return negative + 3.5 * (positive - negative)

    def step(self, transformer: Any, number: int) -> None:
        """One denoising step."""
        timestep = self.scheduler.timesteps[number]
        out = self.predict(transformer, timestep)
        self.latents = self.scheduler.step(out, timestep, self.latents, return_dict=False)[0]
