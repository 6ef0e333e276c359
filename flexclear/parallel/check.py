"""``torchrun --nproc-per-node N -m flexclear.parallel.check``: compares random shared models with whole ones on this machine.

Models are small FLUX transformers with random weights. Sizes, radii, text lengths, batches, shares, pooled keys and exchanges
are drawn from a seed, the same on every rank. Stale borders are compared over steps with the same input, in which they equal the
current ones. Exits with status 1 at the first difference. On a GPU this runs NCCL and compiled FlexAttention, and so shows
before a large run whether the machine's connections between devices work.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from typing import Any

import torch
import torch.distributed as dist

from flexclear.convert import restore, transform
from flexclear.parallel import disable, enable, leave

LIMIT = 1e-4
"""Greatest allowed difference in float32; half precision is not compared."""


class Steps:
    """What ``enable`` needs from a pipeline, for a bare model: the model, and a scheduler that counts steps."""

    def __init__(self, model: Any, steps: int) -> None:
        self.transformer, self.scheduler = model, self
        self.timesteps = torch.arange(steps)
        self.step_index = 0


def small_flux(device: torch.device) -> Any:
    """A FLUX of 2 + 2 blocks, 2 heads x 64, random weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(8, 28, 28),
    )
    return model.eval().to(device)


def random_call(draw: random.Random, ranks: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs of random sizes, large enough for the ranks."""
    from diffusers import FluxPipeline

    height, width = draw.randint(8 * ranks, 12 * ranks + 8), draw.randint(6, 8 * ranks)
    if draw.random() < 0.5:
        height, width = width, height
    batch, text_len = draw.choice([1, 2]), draw.randint(1, 40)
    generator = torch.Generator().manual_seed(draw.randint(0, 1 << 30))
    call = {
        "hidden_states": torch.randn(batch, height * width, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text_len, 16, generator=generator),
        "pooled_projections": torch.randn(batch, 16, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32),
        "txt_ids": torch.zeros(text_len, 3),
    }
    return {name: tensor.to(device) for name, tensor in call.items()}


def check(cases: int, seed: int, backend: str) -> float:
    """Run random cases on every rank of the default process group.

    Returns:
        The greatest difference.

    Raises:
        AssertionError: a shared model differs from the whole one.
    """
    ranks = dist.get_world_size()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    model = small_flux(device)
    draw = random.Random(seed)
    worst = 0.0
    for number in range(cases):
        call = random_call(draw, ranks, device)
        radii = [draw.choice([1, 2, 4, 7, 15, 30]) for _ in range(4)]
        down_factor = draw.choice([None, None, 3, 4])
        shares = draw.choice([None, [draw.uniform(0.5, 2) for _ in range(ranks)]])
        exchange = draw.choice(["sync", "stale"])
        pipe = Steps(model, 1 if exchange == "sync" else 4)
        transform(model, radii, down_factor=down_factor, backend=backend)
        error = 0.0
        with torch.no_grad():
            whole = model(**call).sample
            enable(pipe, exchange=exchange, warmup_steps=1, shares=shares)
            for step in range(len(pipe.timesteps)):
                pipe.step_index = step
                error = max(error, (model(**call).sample - whole).abs().max().item())
        disable(pipe)
        restore(model)
        worst = max(worst, error)
        size = tuple(int(n) + 1 for n in call["img_ids"].amax(0)[1:])
        told = (
            f"case {number + 1} of {cases}: {size} tokens, r {radii}, down_factor {down_factor}, {exchange}, "
            f"difference {error:.1e}"
        )
        if dist.get_rank() == 0:
            print(told, flush=True)
        assert error <= LIMIT, told
    return worst


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", help="auto, flex or sdpa")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit("start with torchrun --nproc-per-node N -m flexclear.parallel.check")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    worst = check(arguments.cases, arguments.seed, arguments.backend)
    if dist.get_rank() == 0:
        print(f"{arguments.cases} cases on {dist.get_world_size()} ranks: all equal, greatest difference {worst:.1e}")
    leave()


if __name__ == "__main__":
    main()
