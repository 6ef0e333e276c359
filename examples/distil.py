"""Distil a window into a model, then draw with the new weights.

    flexclear data generate black-forest-labs/FLUX.1-dev --prompts prompts.txt --count 10000 --out images
    flexclear data cache images --model black-forest-labs/FLUX.1-dev --out cache
    accelerate launch examples/distil.py --data cache --output runs/r16

Images drawn by the model itself teach best. A folder of your own images with captions (``NAME.png`` beside ``NAME.txt``) also
works instead of the cache, and is encoded first. A run that was stopped resumes with the same command.
``flexclear distill settings.yaml`` does the same from a file.
"""

import argparse
import os
from pathlib import Path

import flexclear
import torch
from diffusers import DiffusionPipeline
from flexclear.distill import DistillConfig, OptimizerConfig, distill
from flexclear.distill.config import HeldOutConfig


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil a window into a model.")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="hub id, pipeline folder or 'embedded'")
    parser.add_argument("--data", type=Path, required=True, help="folder of 'flexclear data cache', or of images")
    parser.add_argument("--output", type=Path, default=Path("runs/r16"))
    parser.add_argument("--r", type=int, default=16, help="window radius in tokens")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=2, help="images per device and forward pass")
    parser.add_argument("--held-out", type=int, default=32, help="images that are held out of training and measured")
    parser.add_argument("--optimizer", default="prodigy", choices=["prodigy", "adamw"])
    parser.add_argument(
        "--prompt", default="a red apple on a blue background", help="prompt of the image drawn at the end"
    )
    parser.add_argument("--sample", type=int, default=1024, help="side of that image in pixels")
    parser.add_argument("--sample-steps", type=int, default=28, help="its denoising steps")
    parser.add_argument("--backend", default="auto", choices=["auto", "flex", "sdpa"])
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()

    config = DistillConfig(  # everything else is as published
        model=args.model,
        data=args.data,
        output=args.output,
        r=args.r,
        steps=args.steps,
        batch_size=args.batch_size,
        optimizer=OptimizerConfig(args.optimizer),
        held_out=HeldOutConfig(args.held_out, every=500),
        mixed_precision="bf16" if on_gpu else "no",
        gradient_checkpointing=on_gpu,
        backend=args.backend,
    )
    done = distill(config=config, say=print)
    if int(os.environ.get("RANK", 0)):
        return
    if done.interrupted:
        print("interrupted; the same command goes on from the last checkpoint")
        return
    if done.losses:
        print(f"loss: {done.losses[0]['loss']:.4f} at first, {done.losses[-1]['loss']:.4f} in step {done.steps}")

    folder = flexclear.embedded.model_directory() if args.model == "embedded" else args.model
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16 if on_gpu else torch.float32)
    flexclear.transform(pipe.to("cuda" if on_gpu else "cpu"), r=args.r, backend=args.backend)
    flexclear.load_weights(pipe, done.weights)
    image = pipe(
        args.prompt,
        height=args.sample,
        width=args.sample,
        num_inference_steps=args.sample_steps,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    image.save(args.output / "sample.png")
    print(f"weights: {done.weights}, an image drawn with them: {args.output / 'sample.png'}")


if __name__ == "__main__":
    main()
