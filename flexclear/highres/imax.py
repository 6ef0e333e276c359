"""I-Max's projected flow (arXiv 2410.07536, section 3.2): a scheduler whose steps follow a picture in the low frequencies."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reshape = Callable[[Tensor], Tensor]


def check_wavelet(wavelet: str, level: int) -> None:
    """Raise for what is no discrete wavelet, or a level below 1.

    Raises:
        ImportError: PyWavelets is missing.
        TypeError, ValueError: the wavelet or its level makes no sense.
    """
    known = _pywt().wavelist(kind="discrete")
    if wavelet not in known:
        raise ValueError(f"wavelet must be a discrete one of PyWavelets, such as 'haar' or 'db2', got {wavelet!r}")
    if isinstance(level, bool) or not isinstance(level, int):
        raise TypeError(f"wavelet_level must be a whole number, got {level!r}")
    if level < 1:
        raise ValueError(f"wavelet_level must be 1 or more, got {level}")


def low_band(latents: Tensor, wavelet: str = "haar", level: int = 1) -> Tensor:
    """The approximation band of a discrete wavelet transform, transformed back: what is left without the details.

    Args:
        latents: ``[..., height, width]``, any sides.
        wavelet: of PyWavelets.
        level: how many times the approximation is split again.

    Returns:
        The same shape, type and device. Computed in float32 on the CPU, where PyWavelets runs.
    """
    pywt = _pywt()
    values = latents.detach().to("cpu", torch.float32).numpy()
    low, *details = pywt.wavedec2(values, wavelet, level=level, axes=(-2, -1))
    bands = [low, *((None, None, None) for _ in details)]
    height, width = latents.shape[-2:]
    back = pywt.waverec2(bands, wavelet, axes=(-2, -1))[..., :height, :width]  # Odd sides come back one longer.
    return torch.from_numpy(back.copy()).to(latents)


def projected_velocity(
    velocity: Tensor, sample: Tensor, guide: Tensor, sigma: float, weight: float, band: Reshape
) -> Tensor:
    """v + c (low(p) - low(v)), where p = (x - g) / t is the velocity that leads straight to the guide.

    Args:
        velocity: v, the model's prediction (noise minus picture).
        sample: x, the noisy latents at level t.
        guide: g, the latents of the enlarged picture.
        sigma: t, above 0.
        weight: c.
        band: low; linear, so that it is taken once, of p - v.
    """
    return velocity + weight * band((sample - guide) / sigma - velocity)


def decay(step: int, steps: int) -> float:
    """c at a step from 0: a half cosine from 1 towards 0, which the end of the last step reaches."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def projected_scheduler(scheduler: Any, guide: Tensor, to_picture: Reshape, to_tokens: Reshape, band: Reshape) -> Any:
    """A copy of a flow-matching scheduler whose steps are those of I-Max.

    Args:
        scheduler: a ``FlowMatchEulerDiscreteScheduler``.
        guide: g, ``[B, channels, height, width]``.
        to_picture: the pipeline's latents, as its steps get them, to that shape.
        to_tokens: back.
        band: see ``low_band``.
    """
    made = _projected_class().from_config(scheduler.config)
    made.guide, made.to_picture, made.to_tokens, made.band = guide, to_picture, to_tokens, band
    return made


@functools.cache
def _projected_class() -> Any:
    # Made on first use: importing flexclear.highres imports no diffusers.
    from diffusers import FlowMatchEulerDiscreteScheduler

    class ProjectedFlowScheduler(FlowMatchEulerDiscreteScheduler):
        """Euler steps along I-Max's velocity in place of the model's."""

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


def _pywt() -> Any:
    try:
        import pywt
    except ImportError as error:
        raise ImportError("method='imax' splits frequencies with PyWavelets: pip install PyWavelets") from error
    return pywt
