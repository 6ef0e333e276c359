"""Draw one image on several GPUs: each process computes a band, and every process gets the whole image.

    torchrun --nproc-per-node 2 examples/two_processes.py                       # FLUX.1-dev at 4096 px, NCCL
    torchrun --nproc-per-node 2 examples/two_processes.py --model embedded --size 128x128 --radius 4 --steps 4

The second line runs on CPUs, with gloo. ``python examples/two_processes.py ...`` draws the same image in one process.
"""

import argparse
import os

import flexclear
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw one image on several GPUs.")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="hub id, pipeline folder or 'embedded'")
    parser.add_argument("--prompt", default="a red apple on a blue background")
    parser.add_argument("--size", default="4096x4096", help="HEIGHTxWIDTH in pixels")
    parser.add_argument(
        "--radius", type=int, default=16, help="window radius in tokens"
    )  # torchrun takes --r as its own
    parser.add_argument("--weights", help="safetensors file distilled for this radius")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", choices=["auto", "flex", "sdpa"])
    parser.add_argument("--out", default="image.png")
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)

    folder = flexclear.embedded.model_directory() if args.model == "embedded" else args.model
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16 if on_gpu else torch.float32)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=rank > 0)

    flexclear.transform(pipe, r=args.radius, backend=args.backend)
    if args.weights:
        flexclear.load_weights(pipe, args.weights)
    if world > 1:
        flexclear.parallel.enable(pipe)  # also makes the process group

    generator = torch.Generator().manual_seed(args.seed)  # the same on every rank; else the first step reports it
    image = pipe(args.prompt, height=height, width=width, num_inference_steps=args.steps, generator=generator).images[0]
    if rank == 0:
        image.save(args.out)
        print(f"{args.out}: {image.height} x {image.width} by {world} processes")
    if world > 1:
        print(f"rank {rank} has sent {sum(flexclear.parallel.sent_bytes(pipe).values()) / 2**20:.1f} MiB")
        flexclear.parallel.disable(pipe)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
