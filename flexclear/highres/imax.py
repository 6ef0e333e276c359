"""I-Max's projected flow (arXiv 2410.07536, section 3.2): a scheduler whose low frequencies follow an image."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Reshape = Callable[[Tensor], Tensor]


def check_level(level: int) -> None:
    """Raise for an invalid level of the wavelet transform.

    Raises:
        TypeError, ValueError: it is not a whole number, or is below 1.
    """
    if isinstance(level, bool) or not isinstance(level, int):
        raise TypeError(f"wavelet_level must be a whole number, got {level!r}")
    if level < 1:
        raise ValueError(f"wavelet_level must be 1 or more, got {level}")


def low_band(latents: Tensor, level: int = 1) -> Tensor:
    """The approximation band of the Haar wavelet transform, transformed back: each cell of 2 x 2 latents becomes its mean.

    An odd side ends in a cell of half the size, as in the transform with symmetric extension.

    Args:
        latents: ``[..., height, width]``, any sides.
        level: number of transforms; cells have ``2**level`` latents a side.

    Returns:
        The same shape, type and device, computed there in float32 or wider.
    """
    cells = latents.to(torch.promote_types(latents.dtype, torch.float32)).reshape(-1, *latents.shape[-2:])
    sides = []
    for _ in range(level):
        sides.append(cells.shape[-2:])
        cells = F.avg_pool2d(cells, 2, ceil_mode=True)
    for height, width in reversed(sides):
        cells = cells.repeat_interleave(2, -2)[..., :height, :].repeat_interleave(2, -1)[..., :width]
    return cells.reshape(latents.shape).to(latents.dtype)


def projected_velocity(
    velocity: Tensor, sample: Tensor, guide: Tensor, sigma: float, weight: float, band: Reshape
) -> Tensor:
    """v + c (low(p) - low(v)), where p = (x - g) / t is the velocity that leads straight to the guide.

    Args:
        velocity: v, the model's prediction (noise minus image).
        sample: x, the noisy latents at level t.
        guide: g, the latents of the enlarged image.
        sigma: t, above 0.
        weight: c.
        band: low. It is linear, so it is applied once, to p - v.
    """
    return velocity + weight * band((sample - guide) / sigma - velocity)


def decay(step: int, steps: int) -> float:
    """c at a step, counted from 0: a half cosine from 1 to 0, reached at the end of the last step."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def projected_scheduler(scheduler: Any, guide: Tensor, to_picture: Reshape, to_tokens: Reshape, band: Reshape) -> Any:
    """A copy of a flow-matching scheduler whose steps are those of I-Max.

    Args:
        scheduler: a ``FlowMatchEulerDiscreteScheduler``.
        guide: g, ``[B, channels, height, width]``.
        to_picture: reshapes the pipeline's latents, as its steps get them, to that shape.
        to_tokens: reshapes back.
        band: see ``low_band``.
    """
    made = _projected_class().from_config(scheduler.config)
    made.guide, made.to_picture, made.to_tokens, made.band = guide, to_picture, to_tokens, band
    return made


@functools.cache
def _projected_class() -> Any:
    # Made on first use, so that importing flexclear.highres does not import diffusers.
    from diffusers import FlowMatchEulerDiscreteScheduler

    class ProjectedFlowScheduler(FlowMatchEulerDiscreteScheduler):
        """Euler steps along I-Max's velocity instead of the model's."""

        guide: Tensor
        to_picture: Reshape
        to_tokens: Reshape
        band: Reshape

        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.step_index is None:
                self._init_step_index(timestep)
            velocity, noisy = (self.to_picture(t).float() for t in (model_output, sample))
            guide = self.guide.to(velocity)
            sigma, weight = self.sigmas[self.step_index].item(), decay(self.step_index, len(self.timesteps))
            guided = projected_velocity(velocity, noisy, guide, sigma, weight, self.band)
            return super().step(self.to_tokens(guided).to(model_output.dtype), timestep, sample, *args, **kwargs)

    return ProjectedFlowScheduler
