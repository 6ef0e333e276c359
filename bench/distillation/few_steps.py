"""A few-step variant of the embedded model, in the place that FLUX.1-schnell has beside FLUX.1-dev (the paper's Table 4).

Schnell's own recipe (adversarial distillation in latent space) needs a discriminator. The stand-in here is reflow (Liu et al.
2022, arXiv 2209.03003): all weights of the transformer are tuned by the flow loss on the teacher's own pairs of noise and
image, which straightens the way from one to the other, so that a few steps suffice. Like schnell it is a model of its own
with every weight changed, and it has never seen a window.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flexclear.distill.batches import Batch, Order
from flexclear.distill.calls import flux_call, pack
from flexclear.distill.samples import CachedSamples, stack
from flexclear.embedded.train.checkpoint import load_checkpoint, save_checkpoint

from bench.distillation.data import noise_of

EVERY = 50


def reflow_batch(samples: CachedSamples, indices: list[int], name: str) -> Batch:
    """Images with the noise that each began from, at noise levels drawn evenly; ``name`` seeds them."""
    tensors = stack(samples[index] for index in indices)
    generator = torch.Generator().manual_seed(random.Random(name).getrandbits(62))
    return Batch(
        (tensors["mean"].float() - samples.shift_factor) * samples.scaling_factor,
        torch.stack([noise_of(samples, index) for index in indices]),
        torch.rand(len(indices), generator=generator),
        tensors["prompt_embeds"].float(),
        tensors["pooled"].float(),
    )


def reflow(
    model: Any,
    samples: CachedSamples,
    checkpoint: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train every weight of ``model``, a FLUX transformer, in place; resumes from ``checkpoint`` if there is one.

    Raises:
        ValueError: the checkpoint is of a run with other settings.
        FloatingPointError: the loss is not finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    order = Order(samples, range(len(samples)), batch_size, seed)
    done = 0
    if checkpoint.is_file():
        state = load_checkpoint(checkpoint)
        if state["settings"] != settings:
            raise ValueError(f"{checkpoint} is of other settings, {state['settings']}; now {settings}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    model.train()
    for step in range(done, steps):
        for group in optimizer.param_groups:
            warmth = min(1.0, (step + 1) / max(1, steps // 20))
            group["lr"] = learning_rate * warmth * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = reflow_batch(samples, order[step], f"{seed}/reflow {step}").to(device, torch.float32)
        predicted = model(**flux_call(model, batch, 3.5))[0]
        loss = F.mse_loss(predicted, pack(batch.noise - batch.latents))
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the loss of step {step + 1} is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step + 1 == steps or (step + 1) % EVERY == 0:
            save_checkpoint(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "settings": settings,
                },
            )
        on_step(step + 1, loss.item())
    model.eval()
