"""How each class of transformer is called on a batch of noisy latents, and what it should predict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexclear.distill.batches import Batch, noisy
from flexclear.distill.samples import Samples

Mismatch = tuple[str, Any, Any]
"""(what differs, what the samples have, what the model takes)."""


@dataclass(frozen=True)
class Caller:
    """What the trainer knows about a class of transformer.

    Attributes:
        call: returns the arguments of the model's call, given the model, a batch on its device with text in the model's compute
            type, and the guidance, which is ignored if the model has no guidance embedding.
        velocity: returns noise - latents in the form of the model's prediction, given the model and the batch.
        mismatches: lists what the model does not take of a sample's shape, given the model's configuration and that shape.
        video: whether the model's latents have frames.
    """

    call: Callable[[Any, Batch, float], dict[str, Any]]
    velocity: Callable[[Any, Batch], Tensor]
    mismatches: Callable[[Any, Sequence[tuple[int, ...]]], Iterable[Mismatch]]
    video: bool = False


def pack(latents: Tensor) -> Tensor:
    """Pack ``[B, C, h, w]`` into tokens of 2 x 2 latents in raster order, ``[B, h/2 * w/2, 4 C]``."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def flux_call(model: Any, batch: Batch, guidance: float) -> dict[str, Any]:
    """Arguments of a FLUX transformer's call; see ``Caller``."""
    device, dtype = batch.latents.device, batch.prompt_embeds.dtype
    count, (height, width) = len(batch.latents), (side // 2 for side in batch.latents.shape[-2:])
    ids = torch.zeros(height, width, 3, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)[None]
    return {
        "hidden_states": pack(noisy(batch)).to(dtype),
        "encoder_hidden_states": batch.prompt_embeds,
        "pooled_projections": batch.pooled,
        "timestep": batch.sigmas.to(dtype),
        "guidance": torch.full((count,), guidance, device=device) if model.config.guidance_embeds else None,
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(batch.prompt_embeds.shape[1], 3, device=device),
        "return_dict": False,
    }


def _flux_mismatches(config: Any, shape: Sequence[tuple[int, ...]]) -> Iterable[Mismatch]:
    (channels, *sides), (_, text), pooled = shape
    if len(sides) != 2:
        yield "dimensions of latents", len(sides) + 1, 3
        return
    yield "latent channels (4 x the latents' channels)", channels * 4, config.in_channels
    yield "text features", text, config.joint_attention_dim
    yield "pooled features", (*pooled, None)[0], config.pooled_projection_dim
    if any(side % 2 for side in sides):
        yield "latents", " x ".join(map(str, sides)), "even sides, which are packed 2 x 2"


TRAINED_TIMES = 1000
"""Number of timesteps that video models count for noise levels from 0 to 1."""


def wan_call(model: Any, batch: Batch, guidance: float) -> dict[str, Any]:
    """Arguments of a Wan transformer's text-to-video call; see ``Caller``."""
    return {
        "hidden_states": noisy(batch).to(batch.prompt_embeds.dtype),
        "encoder_hidden_states": batch.prompt_embeds,
        "timestep": batch.sigmas * TRAINED_TIMES,
        "return_dict": False,
    }


def _wan_mismatches(config: Any, shape: Sequence[tuple[int, ...]]) -> Iterable[Mismatch]:
    (channels, *sides), (_, text), pooled = shape
    if config.in_channels != config.out_channels:
        yield (
            "input channels",
            channels,
            f"{config.in_channels}, an image's among them, which training does not give it",
        )
    if len(sides) != 3:
        yield "dimensions of latents", len(sides) + 1, "4, [C, F, h, w]"
        return
    yield "latent channels", channels, config.in_channels
    yield "text features", text, config.text_dim
    if pooled:
        yield "pooled features", pooled[0], "none"
    if any(side % part for side, part in zip(sides, config.patch_size, strict=True)):
        yield "latents", " x ".join(map(str, sides)), f"multiples of its patches, {tuple(config.patch_size)}"


CALLERS: dict[str, Caller] = {
    "FluxTransformer2DModel": Caller(
        flux_call, lambda model, batch: pack(batch.noise - batch.latents), _flux_mismatches
    ),
    "WanTransformer3DModel": Caller(
        wan_call, lambda model, batch: batch.noise - batch.latents, _wan_mismatches, video=True
    ),
}
"""Callers by the name of the transformer's class in diffusers."""


def class_name(model: Any) -> str:
    """The name in ``CALLERS`` of a model's class or of a base class; if there is none, the class's own name."""
    bases = (base.__name__ for base in type(model).__mro__)
    return next((name for name in bases if name in CALLERS), type(model).__name__)


def caller_of(model: Any) -> Caller:
    """What the trainer knows about the class of ``model``."""
    return CALLERS[class_name(model)]


def check_samples(samples: Samples, model: Any, fingerprint: str | None = None, name: str = "the data") -> None:
    """Raise unless ``model`` takes the samples.

    Args:
        samples: all of them.
        model: a transformer of ``CALLERS``.
        fingerprint: that of the pipeline's encoders; None if not known.
        name: what to call the samples in the message.

    Raises:
        ValueError: other encoders made them, or sizes do not fit; the message says which one it is.
    """
    if not len(samples):
        raise ValueError(f"{name}: no samples")
    if fingerprint is not None and samples.fingerprint is not None and samples.fingerprint != fingerprint:
        made = getattr(samples, "model", "another model")
        raise ValueError(
            f"{name} was encoded by encoders other than this model's (by {made}; fingerprint {samples.fingerprint}, the "
            f"model's is {fingerprint}). Run flexclear data cache again with this model"
        )
    caller = caller_of(model)
    for index in range(len(samples)):
        for what, given, wanted in caller.mismatches(model.config, samples.shape(index)):
            if given != wanted:
                raise ValueError(
                    f"{name} does not fit the {type(model).__name__}: sample {index} has {given} {what}, the model takes "
                    f"{wanted}"
                )
