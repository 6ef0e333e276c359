"""Decides what each training step sees. The seed and the batch's number determine everything, so a run resumes exactly."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexclear.distill.config import TimestepConfig
from flexclear.distill.samples import Factor, Samples, stack


@dataclass(frozen=True)
class Batch:
    """Inputs of teacher and student, on the CPU in float32 until ``to``.

    Attributes:
        latents: clean, normalized, ``[B, C, h, w]``, or ``[B, C, F, h, w]`` for videos.
        noise: standard normal, the same shape.
        sigmas: noise levels from 0 to 1, ``[B]``.
        prompt_embeds: ``[B, T, D]``.
        pooled: ``[B, P]``, or None if the model takes none.
    """

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    prompt_embeds: Tensor
    pooled: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Move the batch to a device. What only the model reads is cast; latents and noise stay as they are for the losses."""
        return Batch(
            self.latents.to(device),
            self.noise.to(device),
            self.sigmas.to(device),
            self.prompt_embeds.to(device, dtype),
            None if self.pooled is None else self.pooled.to(device, dtype),
        )


def noisy(batch: Batch) -> Tensor:
    """Latents on the straight line to the noise, each at its noise level."""
    sigmas = batch.sigmas.view(-1, *[1] * (batch.latents.ndim - 1))
    return (1 - sigmas) * batch.latents + sigmas * batch.noise


class Order:
    """Which samples are in which batch. Every epoch visits every sample; a batch holds samples of one shape.

    If the batch size does not divide a group of samples, the group is padded with samples from its own beginning.
    """

    def __init__(self, samples: Samples, indices: Sequence[int], batch_size: int, seed: int) -> None:
        self._groups: dict[object, list[int]] = defaultdict(list)
        for index in indices:
            self._groups[samples.shape(index)].append(index)
        self._batch_size, self._seed = batch_size, seed
        self._epoch: tuple[int, list[list[int]]] | None = None
        self.per_epoch = sum(-(-len(group) // batch_size) for group in self._groups.values())

    def __getitem__(self, number: int) -> list[int]:
        epoch, place = divmod(number, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._make(epoch)
        return self._epoch[1][place]

    def _make(self, epoch: int) -> list[list[int]]:
        choice = random.Random(f"{self._seed}/epoch {epoch}")
        batches = []
        for group in self._groups.values():
            shuffled = list(group)
            choice.shuffle(shuffled)
            while len(shuffled) % self._batch_size:
                shuffled.extend(shuffled[: self._batch_size - len(shuffled) % self._batch_size])
            batches += [shuffled[at : at + self._batch_size] for at in range(0, len(shuffled), self._batch_size)]
        choice.shuffle(batches)
        return batches


class BatchMaker:
    """Makes the batch of a given number, always the same one. ``drawn``: latents are sampled from the moments; otherwise
    they are the means."""

    def __init__(
        self,
        samples: Samples,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        timesteps: TimestepConfig,
        drawn: bool = True,
    ) -> None:
        self._samples, self._seed, self._timesteps, self._drawn = samples, seed, timesteps, drawn
        self._order = Order(samples, indices, batch_size, seed)

    def make(self, number: int) -> Batch:
        """Batch ``number``, counted from 0 over all devices."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        generator = _generator(f"{self._seed}/batch {number}")
        indices, given = self._order[number], self._timesteps
        latents, tensors = _latents(self._samples, indices, generator, self._drawn)
        u = compute_density_for_timestep_sampling(
            "none" if given.sampling == "uniform" else given.sampling,
            len(indices),
            given.mean,
            given.std,
            given.mode_scale,
            generator=generator,
        )
        return Batch(
            latents,
            torch.randn(latents.shape, generator=generator),
            given.shift * u / (1 + (given.shift - 1) * u),
            tensors["prompt_embeds"],
            tensors.get("pooled"),
        )


def held_out_indices(count: int, total: int, seed: int) -> list[int]:
    """Choose ``count`` of ``total`` samples that training does not see.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if count >= total:
        raise ValueError(f"held_out.count is {count} of {total} samples: none are left to train on")
    return sorted(random.Random(f"{seed}/held out").sample(range(total), count))


def held_out_batches(
    samples: Samples, indices: Sequence[int], batch_size: int, seed: int, drawn: bool = True
) -> list[Batch]:
    """Return every held-out sample once, each with its own noise, at noise levels spread evenly from 0 to 1."""
    groups: dict[object, list[int]] = defaultdict(list)
    for index in indices:
        groups[samples.shape(index)].append(index)
    levels = {index: (2 * place + 1) / (2 * len(indices)) for place, index in enumerate(indices)}
    batches = []
    for group in groups.values():
        for at in range(0, len(group), batch_size):
            chosen = group[at : at + batch_size]
            parts, noise = [], []
            for index in chosen:
                generator = _generator(f"{seed}/held out {index}")
                parts.append(_latents(samples, [index], generator, drawn)[0])
                noise.append(torch.randn(parts[-1].shape, generator=generator))
            tensors = stack(samples[index] for index in chosen)
            sigmas = torch.tensor([levels[index] for index in chosen])
            batches.append(
                Batch(torch.cat(parts), torch.cat(noise), sigmas, tensors["prompt_embeds"], tensors.get("pooled"))
            )
    return batches


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(name).getrandbits(62))


def _latents(
    samples: Samples, indices: Sequence[int], generator: torch.Generator, drawn: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return latents in float32, sampled from the moments or their means, and all tensors of the samples."""
    tensors = stack(samples[index] for index in indices)
    mean, logvar = tensors["mean"].float(), tensors["logvar"].float()
    noise = torch.randn(mean.shape, generator=generator)
    latents = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise if drawn else mean
    shift, scaling = (_per_channel(factor, latents.ndim) for factor in (samples.shift_factor, samples.scaling_factor))
    return (latents - shift) * scaling, tensors


def _per_channel(factor: Factor, dimensions: int) -> Tensor | float:
    """Return a number, or one per channel that broadcasts with latents ``[B, C, ...]``."""
    if isinstance(factor, float | int):
        return factor
    return torch.tensor(factor).view(-1, *[1] * (dimensions - 2))
